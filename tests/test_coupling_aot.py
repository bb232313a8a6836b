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
from benchmarks.aot import SAMPLED, parse_ptxas

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
@pytest.mark.parametrize("capability", SAMPLED)
def test_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    # The full table takes a quarter of an hour: `python -m benchmarks.aot` prints it.
    arguments = ["--cc", str(capability), "--sample", "--json", str(figures)]
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
    assert len([row for row in rows if row["kernel"].split()[0] in coupling]) >= (60 if capability == 90 else 6)
    assert len([row for row in rows if row["kernel"].split()[0] not in coupling]) >= 22
    assert not [row for row in rows if row["stack"] or row["spill_stores"] or row["spill_loads"]]
    # Two resident blocks are the least that hides anything: 65536 registers an SM, 100 KiB of shared memory on sm_86.
    assert not [row for row in rows if 2 * row["registers"] * row["threads"] > 65536 or row["shared"] > 48 * 1024]
    assert all(row["registers"] for row in rows)
    assert status == 0, said


def test_what_the_sample_leaves_out() -> None:
    """sm_89, which has sm_86's figures, and what is far from its bound: for some GPUs, each case for two at least."""
    rows = aot.table()
    several = [figures for figures in rows.values() if len(figures) > 1]
    assert len(several) >= 50 and all(figures[86] == figures[89] for figures in several)
    names = [*rows, "a kernel that is not in the table"]
    cases = [aot.Case(name, None, {}, {}, frozenset(), {}) for name in names]
    chosen = {capability: {case.name for case in aot.sampled(cases, capability)} for capability in SAMPLED}
    always = set.intersection(*chosen.values())
    assert names[-1] in always and len(always) < len(names)
    assert {name.split()[0] for name in always} == {name.split()[0] for name in names}
    for name in rows:
        assert sum(name in each for each in chosen.values()) >= 2
        near = max(share for share, _ in rows[name].values()) >= aot.NEAR
        assert name in always or not near


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
