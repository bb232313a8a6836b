"""Every kernel compiles for every supported GPU, with no GPU at hand, and none spills registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import aot
from benchmarks.aot import CAPABILITIES, parse_ptxas

ROOT = Path(__file__).resolve().parent.parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    # The full table of the adapters takes minutes: `python -m benchmarks.aot` prints it.
    arguments = ["--cc", str(capability), "--full-adapters", "--json", str(figures)]
    if os.environ.get("TRITON_INTERPRET") == "1":  # what is imported here are no kernels to compile
        done = _run("-m", "benchmarks.aot", *arguments, cache=tmp_path)
        status, said = done.returncode, done.stdout + done.stderr
    else:  # spares a process that imports torch, transformers and Triton anew for each capability
        status, said = aot.main(arguments), "a kernel spills, see the table above"
    assert figures.exists(), said
    rows = json.loads(figures.read_text())
    kernels = {row["kernel"].split()[0] for row in rows}
    coupling = {"couple_exact", "uncouple_exact", "couple_float", "uncouple_float"}
    adapters = {"adapter", "adapter_couple", "adapter_uncouple", "adapter_backward", "adapter_uncouple_backward"}
    assert kernels == coupling | adapters | {"adapter_weights", "sum_splits"}
    assert len([row for row in rows if row["kernel"].split()[0] in coupling]) >= (60 if capability == 90 else 12)
    assert len([row for row in rows if row["kernel"].split()[0] not in coupling]) >= 30
    assert not [row for row in rows if row["stack"] or row["spill_stores"] or row["spill_loads"]]
    # Two resident blocks are the least that hides anything: 65536 registers an SM, 100 KiB of shared memory on sm_86.
    assert not [row for row in rows if 2 * row["registers"] * row["threads"] > 65536 or row["shared"] > 48 * 1024]
    assert all(row["registers"] for row in rows)
    assert status == 0, said


@needs_triton
def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    done = _run("tests/isolated/spilling.py", cache=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Resources(registers=255" in done.stdout, done.stdout


def test_parser() -> None:
    log = "  96 bytes stack frame, 92 bytes spill stores, 88 bytes spill loads\nptxas info : Used 255 registers, used"
    used = parse_ptxas(log)
    assert used == (255, 96, 92, 88, 0)
    assert used.spills
    assert not used._replace(stack=0, spill_stores=0, spill_loads=0).spills
    assert used._replace(stack=0, spill_stores=0).spills
    with pytest.raises(ValueError, match="not a ptxas report"):
        parse_ptxas("")  # what a cache hit leaves
