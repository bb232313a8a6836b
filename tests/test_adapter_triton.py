"""Runs the isolated checks of the adapter kernels, alone and in the engine: interpreted, and on a GPU if any."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.test_coupling_triton import ROOT, run_checks

CHECKS = {"adapter": {"least": 90}, "engine": {"least": 15, "may_skip": 2}}
"""Files of checks, the least number of them, and how many may skip: one needs a GPU, one the SmolLM2 package."""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("checks", sorted(CHECKS))
def test_interpreted(checks: str, tmp_path: Path) -> None:
    path = ROOT / "tests" / "isolated" / f"check_{checks}.py"
    run_checks(path, tmp_path / "report.xml", interpret=True, **CHECKS[checks])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("checks", sorted(CHECKS))
def test_on_the_gpu(checks: str, tmp_path: Path) -> None:
    path = ROOT / "tests" / "isolated" / f"check_{checks}.py"
    run_checks(path, tmp_path / "report.xml", interpret=False, **CHECKS[checks])
