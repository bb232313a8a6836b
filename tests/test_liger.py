"""Runs the isolated checks of Liger-Kernel inside reversible layers, where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.test_coupling_triton import ROOT, run_checks

pytest.importorskip("liger_kernel")
CHECKS = ROOT / "tests" / "isolated" / "check_liger.py"


@pytest.mark.slow
def test_interpreted(tmp_path: Path) -> None:
    run_checks(CHECKS, tmp_path / "report.xml", interpret=True, least=6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu(tmp_path: Path) -> None:
    run_checks(CHECKS, tmp_path / "report.xml", interpret=False, least=6)
