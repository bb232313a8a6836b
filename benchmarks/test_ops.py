"""The functional ops beside what one would write without them: bytes that must move, and how fast they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.kernel_cases import OPS, WITH_RANK, Case, least_bytes, mismatch, rivals

SHAPES = [
    pytest.param(512, 128, 8, id="512x128-r8", marks=pytest.mark.quick),
    pytest.param(8192, 768, 64, id="8192x768-r64", marks=pytest.mark.full),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
@pytest.mark.parametrize("rival", ["fused", "eager", "addmm"])
@pytest.mark.parametrize("op", OPS)
def test_op(
    op: str, rival: str, rows: int, width: int, rank: int, dtype: torch.dtype, timed: Any, device: torch.device
) -> None:
    case = Case(op, rows, width, rank if op in WITH_RANK else None, dtype)
    if rival == "fused" and device.type == "cpu":
        pytest.skip("the fused kernels run on a GPU; here the library's own op is eager")
    calls: dict[str, Callable[[], Any]] = rivals(case, device, compiled=False)
    if rival not in calls:
        pytest.skip("couple and uncouple have no matrix product to write by hand")
    assert mismatch(case, device) is None
    seconds = timed(calls[rival], group=case.label, rival=rival, least_bytes=least_bytes(case))
    timed.extra_info["gigabytes_per_second"] = least_bytes(case) / seconds / 1e9
