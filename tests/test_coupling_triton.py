"""Runs ``isolated/check_coupling.py`` in its own processes: under Triton's interpreter, and on a GPU if any."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "tests" / "isolated" / "check_coupling.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_checks(checks: Path, report: Path, *, interpret: bool, least: int = 100, may_skip: int = 0) -> None:
    """Run a file of checks with pytest in a new process; whatever fails there fails here, with its output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    # `addopts=` drops what the project adds (coverage, parallel runs). The interpreter runs on numpy, which warns where
    # a GPU silently gives inf or NaN.
    command = [sys.executable, "-m", "pytest", str(checks), "-q", "-o", "addopts=", "-p", "no:cacheprovider",
               "-W", "ignore::RuntimeWarning", f"--junitxml={report}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    output = f"\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, output
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, output
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert not counts["failures"] + counts["errors"], output
    assert counts["skipped"] <= may_skip, output
    assert counts["tests"] >= least, output


@pytest.mark.slow
def test_interpreted(tmp_path: Path) -> None:
    run_checks(CHECKS, tmp_path / "report.xml", interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu(tmp_path: Path) -> None:
    run_checks(CHECKS, tmp_path / "report.xml", interpret=False)


def test_failures_surface(tmp_path: Path) -> None:
    broken = tmp_path / "check_broken.py"
    broken.write_text("def test_passes():\n    pass\n\n\ndef test_fails():\n    assert 'seen' == 'outside'\n")
    with pytest.raises(AssertionError, match="outside"):
        run_checks(broken, tmp_path / "report.xml", interpret=True)
