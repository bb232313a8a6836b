"""``benchmarks.kernels`` without a GPU: its dry run, its refusals, its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernel_cases, kernels
from benchmarks.kernel_cases import Case


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was timed" in printed
    assert "ms" not in printed.split()
    for op in kernel_cases.OPS:
        assert f"{op} torch.float32 16 x 32" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().out


def test_no_speeds_of_wrong_ops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = kernel_cases._op

    def wrong(case: Case, given: kernel_cases.Inputs, impl: str) -> Any:
        call = right(case, given, impl)
        return call if impl == "torch" or case.op != "parallel_adapter" else lambda: call() + 1

    monkeypatch.setattr(kernel_cases, "_op", wrong)
    assert kernels.main(["--dry-run"]) == 1
    printed = capsys.readouterr().out
    assert "no speeds" in printed
    assert "parallel_adapter torch.bfloat16 63 x 100, r = 8: result 0 is off" in printed
    assert "nothing was timed" not in printed


def test_roofline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.roofline import draw

    timing = {"median": 0.5, "low": 0.4, "high": 0.6}
    results = [
        {"op": case.op, "rows": case.rows, "width": case.width, "flops": kernel_cases.flops(case),
         "least_bytes": kernel_cases.least_bytes(case), "of_copy_bandwidth": 0.8, "milliseconds": {"fused": timing}}
        for case in (Case("couple", 64, 64, None, torch.float32), Case("parallel_adapter", 64, 64, 8, torch.float32))
    ]  # fmt: skip
    draw("a device", 3e12, results, tmp_path / "deep" / "roofline.png")
    assert (tmp_path / "deep" / "roofline.png").read_bytes().startswith(b"\x89PNG")
