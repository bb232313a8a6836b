"""The fused ops as ``benchmarks.kernels`` runs them: inputs, rivals, the bytes and flops they cannot do without."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from meft_kernels import ops
from meft_kernels.fixed_point import reciprocal
from meft_kernels.ops import AdapterWeights
from meft_kernels.ops.coupling.packing import remainder_bits

OPS = (
    "couple",
    "uncouple",
    "adapter_couple",
    "adapter_uncouple_backward",
    "parallel_adapter",
    "parallel_adapter_backward",
)
WITH_RANK = OPS[2:]
FRACTION_BITS = 13
LAYER_LANE = -1 / 256
"""Coefficient of the lane that couples a whole layer, centered; the adapter's lane has coefficient 1 (meft2)."""


class Case(NamedTuple):
    """One op at one shape."""

    op: str
    rows: int
    width: int
    rank: int | None
    dtype: torch.dtype

    @property
    def label(self) -> str:
        rank = "" if self.rank is None else f", r = {self.rank}"
        return f"{self.op} {self.dtype} {self.rows} x {self.width}{rank}"


class Inputs(NamedTuple):
    """Tensors of one case."""

    stream: torch.Tensor
    center: torch.Tensor
    branch: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor
    dx: torch.Tensor
    weights: AdapterWeights


def inputs(case: Case, device: torch.device) -> Inputs:
    """Streams as large as a model's, hidden states of variance 1, an adapter that already does something."""
    torch.manual_seed(0)
    shape, dtype, rank = (case.rows, case.width), case.dtype, case.rank or 16

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, device=device) * std).to(dtype)

    limit = 2 ** (FRACTION_BITS + 3)
    stream, center = (torch.randint(-limit, limit, shape, dtype=torch.int32, device=device) for _ in range(2))
    weights = AdapterWeights(
        normal(rank, case.width, std=0.02), normal(rank), normal(case.width, rank, std=0.02), normal(case.width)
    )
    return Inputs(stream, center, normal(*shape), normal(*shape), normal(*shape), normal(*shape), weights)


def least_bytes(case: Case) -> int:
    """What must be read and written at least once; the adapter's weights count once."""
    size = torch.empty((), dtype=case.dtype).element_size()
    remainder = remainder_bits(reciprocal(LAYER_LANE)[0]) / 8
    per_element = {
        "couple": 4 + 4 + size + 4 + size + remainder,  # a, center, branch; y, value, remainder
        "uncouple": 4 + 4 + size + remainder + 4 + size,
        "adapter_couple": 4 + size + 4 + size,  # a, x; y, value
        "adapter_uncouple_backward": 4 + size + size + size + 4 + size,  # y, x, dy, dx; a, dx
        "parallel_adapter": 3 * size,  # x, residual; out
        "parallel_adapter_backward": 3 * size,  # dy, x; dx
    }[case.op]
    weights = 2 * case.width * case.rank * size if case.rank is not None else 0
    if case.op.endswith("backward"):
        weights *= 2  # and their gradients
    return round(case.rows * case.width * per_element) + weights


def flops(case: Case) -> int:
    """Of the matrix products; backward computes the bottleneck again."""
    if case.rank is None:
        return 0
    products = {"adapter_couple": 2, "adapter_uncouple_backward": 6, "parallel_adapter": 2}
    return 2 * products.get(case.op, 5) * case.rows * case.width * case.rank


def _value(stream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (stream * 2.0**-FRACTION_BITS).to(dtype)


def _careful_adapter(x: torch.Tensor, weights: AdapterWeights) -> torch.Tensor:
    z = F.silu(torch.addmm(weights.down_bias, x, weights.down.t()), inplace=True)
    return torch.addmm(weights.up_bias, z, weights.up.t())


def _careful_couple(given: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    branch = _careful_adapter(given.x, given.weights)
    stream = torch.add(given.stream, branch.float().mul_(2.0**FRACTION_BITS).round_().to(torch.int32))
    return stream, _value(stream, dtype)


def _careful_backward(given: Inputs) -> tuple[torch.Tensor, ...]:
    """Everything by hand: one recompute, five products, no autograd."""
    x, dy, weights = given.x, given.dy, given.weights
    pre = torch.addmm(weights.down_bias, x, weights.down.t())
    z = F.silu(pre)
    d_pre = torch.ops.aten.silu_backward(dy @ weights.up, pre)
    return (torch.addmm(given.dx, d_pre, weights.down), d_pre.t() @ x, d_pre.sum(0), dy.t() @ z, dy.sum(0))


def _careful_uncouple_backward(given: Inputs) -> tuple[torch.Tensor, ...]:
    branch = _careful_adapter(given.x, given.weights)
    stream = torch.sub(given.stream, branch.float().mul_(2.0**FRACTION_BITS).round_().to(torch.int32))
    return stream, *_careful_backward(given)


def _op(case: Case, given: Inputs, impl: str) -> Callable[[], Any]:
    """The library's op on one implementation."""
    exact: dict[str, Any] = {"fraction_bits": FRACTION_BITS, "impl": impl}
    lane = {**exact, "center": given.center, "value_dtype": case.dtype}
    if case.op == "couple":
        return lambda: ops.couple(given.stream, given.branch, LAYER_LANE, **lane)
    if case.op == "uncouple":
        remainder = ops.couple(given.stream, given.branch, LAYER_LANE, **lane).remainder
        return lambda: ops.uncouple(given.stream, given.branch, LAYER_LANE, remainder, **lane)
    adapter = (given.weights, "silu")
    if case.op == "adapter_couple":
        return lambda: ops.adapter_couple(given.stream, given.x, *adapter, 1.0, value_dtype=case.dtype, **exact)
    if case.op == "adapter_uncouple_backward":
        return lambda: ops.adapter_uncouple_backward(
            given.stream, given.dy, given.x, *adapter, 1.0, dx_into=given.dx, **exact
        )
    if case.op == "parallel_adapter":
        return lambda: ops.parallel_adapter(given.x, given.branch, *adapter, impl=impl)  # type: ignore[arg-type]
    return lambda: ops.adapter_backward(given.dy, given.x, *adapter, impl=impl)  # type: ignore[arg-type]


def _fused_impl(device: torch.device) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if device.type == "cuda" or interpreted else "auto"


def rivals(case: Case, device: torch.device, *, compiled: bool = True) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; ``fused`` is ours."""
    given = inputs(case, device)
    eager = _op(case, given, "torch")
    calls = {"fused": _op(case, given, _fused_impl(device)), "eager": eager}
    careful: dict[str, Callable[[], Any]] = {
        "adapter_couple": functools.partial(_careful_couple, given, case.dtype),
        "adapter_uncouple_backward": functools.partial(_careful_uncouple_backward, given),
        "parallel_adapter": lambda: given.branch + _careful_adapter(given.x, given.weights),
        "parallel_adapter_backward": functools.partial(_careful_backward, given),
    }
    if case.op in careful:
        calls["addmm"] = careful[case.op]
    if compiled:
        # Not of our own op, which stays one node of the graph, but of the mathematics.
        calls["compile"] = torch.compile(calls.get("addmm") or _traceable(case, given), dynamic=False)
    return calls


def _traceable(case: Case, given: Inputs) -> Callable[[], Any]:
    """The coupling step without packing's and the checks' Python, for ``torch.compile``."""
    scale = 2.0**FRACTION_BITS

    def couple() -> tuple[torch.Tensor, ...]:
        d = given.stream - given.center
        y = (given.branch.float() * scale).round().to(torch.int32) - (d >> 3)
        return y, (d & 7).to(torch.uint8), _value(y, case.dtype), y.sum(dtype=torch.int64)

    def uncouple() -> tuple[torch.Tensor, ...]:
        d = (given.stream - (given.branch.float() * scale).round().to(torch.int32)) * -8
        a = d + given.center
        return a, _value(a, case.dtype), a.sum(dtype=torch.int64)

    return couple if case.op == "couple" else uncouple


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in _tensors(part)]


def mismatch(case: Case, device: torch.device) -> str | None:
    """How the fused op differs from the reference, or None.

    Without an adapter all integers, and the copies made of them, must be equal. With one, results may lie eight eps of
    the hidden states' dtype, times the largest element, from the reference: both round the bottleneck, the branch and
    the result, at other places. Integers then differ by as much of the branch, and by one more where the last bit of
    the branch decides to which of two integers it is rounded.
    """
    given = inputs(case, device)
    expected = _tensors(_op(case, given, "torch")())
    given = inputs(case, device)  # some ops add into their inputs
    actual = _tensors(_op(case, given, _fused_impl(device))())
    bound = 0.0 if case.rank is None else 8 * torch.finfo(case.dtype).eps
    if len(expected) != len(actual):
        return f"{len(actual)} results, not {len(expected)}"
    for place, (want, got) in enumerate(zip(expected, actual, strict=True)):
        step = _integer_step(case, place, want)
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            return f"result {place} is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
        if want.dim() == 0 and want.dtype == torch.int64 and case.rank is not None:
            continue  # a checksum of integers that may differ; what it sums is compared
        want, got = want.double(), got.double()
        largest = float(want.abs().max()) if want.numel() else 0.0
        off = float((want - got).abs().max()) if want.numel() else 0.0
        if not off <= bound * largest + step:
            return f"result {place} is off by {off:.3g}, of at most {bound * largest + step:.3g}"
    return None


def _integer_step(case: Case, place: int, want: torch.Tensor) -> float:
    """One unit of the integers in a result that is made of them: the stream, and a coupling step's copy of it."""
    if case.rank is None or want.dim() == 0:
        return 0.0
    if want.dtype == torch.int32:
        return 1.0
    return 2.0**-FRACTION_BITS if case.op == "adapter_couple" and place == 1 else 0.0
