"""What the kernels move, recounted load by load; see ``benchmarks.byte_account``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_bytes_over_the_floor(tmp_path: Path) -> None:
    figures = tmp_path / "bytes.json"
    command = [sys.executable, "-m", "benchmarks.byte_account", "--rows", "256", "--rank", "8", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ops = {row["op"]: row for row in json.loads(figures.read_text())}
    for name in ("couple", "uncouple"):
        assert ops[name]["over_floor"] == 1
        assert ops[name]["accesses"] == ops[name]["bytes"]  # nothing is read twice
    assert 1 <= ops["adapter_couple"]["over_floor"] <= 1.15
    assert 1 <= ops["parallel_adapter"]["over_floor"] <= 1.15
    assert 1 <= ops["adapter_uncouple_backward"]["over_floor"] <= 1.3
    # Weight gradients need all of the bottleneck, so x and dy are read a second time: 10 bytes where 6 are the least.
    assert 10 / 6 <= ops["parallel_adapter_backward"]["over_floor"] <= 10 / 6 * 1.15
