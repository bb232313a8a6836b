"""The coupling step as fused Triton kernels: one launch a call, one pass over memory.

Bytes per element; k is the width of the remainder, ceil(log2 q) bits:

    kernel         reads                                        writes
    exact forward  a 4, center 4, branch 2 or 4                 y 4, value 2 or 4, remainder k/8
    exact inverse  y 4, center 4, branch 2 or 4, remainder k/8  a 4, value 2 or 4
    float, both    stream s, center s, branch 2 or 4            stream s, value 2 or 4     (s = 2 or 4)

``center`` and ``value`` are optional. Exact, q = 8, bf16, centred: 16.4, or 14.4 without the value copy. Checksum and
status take one atomic each a program, the latter only when there is something to tell.

Integer streams equal ``reference`` bit for bit, float streams equal it on the CPU: the same fp32 operations in the same
order, no fused multiply-add, IEEE division (torch on CUDA multiplies by the reciprocal of a Python scalar instead).

bfloat16 tensors travel as int16 bit patterns, widened and rounded (to nearest even) by integer operations: Triton's
interpreter truncates its own bf16 casts, and integers round alike everywhere.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..kernel_parts import (
    FP32_MAX,
    LANES,
    LIMIT,
    NATIVE,
    NON_FINITE_FLAG,
    OVERFLOW_FLAG,
    blocks,
    checksums,
    floor_divide,
    load_float,
    pack,
    quantise,
    round_like,
    rows_of_all,
    store_value,
    unpack_part,
    writable_rows,
    written,
)
from ..launching import Launch, all_dense, remembered, without_gradients
from . import reference
from .packing import GROUP, packed_shape, remainder_bits
from .types import Coupled, Uncoupled


@triton.jit
def _tile(groups, row_groups, columns, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Groups of eight neighbours that this program owns: their number, row, the columns of their elements, masks."""
    # EVEN: no group is cut off; the mask is then constant along a group, which lets loads be vectorised.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    group = start + local
    inside = group < groups
    # One 64-bit division a program, 32-bit ones a group: a 64-bit division costs some hundred instructions.
    first = start // row_groups
    local = (start - first * row_groups).to(tl.int32) + local
    row = first + local // row_groups
    column = (local % row_groups).to(tl.int64)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (column < columns)
    return group, inside, row, column, mask


@triton.jit
def _offsets(group, row, column, stride, FLAT: tl.constexpr):
    """Addresses. FLAT: every tensor is dense and no group straddles rows, so a group's number says where it lies."""
    if FLAT:
        return group[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return row[:, None] * stride + column


# Row counts change from batch to batch and must not recompile anything; strides are properties of the model, and their
# divisibility by 16 is what vectorises loads.
_COUNTS = ["groups", "row_groups", "columns"]
_EXACT_COUNTS = [*_COUNTS, "first_row"]


@triton.jit(do_not_specialize=_EXACT_COUNTS)
def couple_exact_kernel(
    a, branch, center, y, value, packed, totals,
    groups, row_groups, columns, a_stride, branch_stride, center_stride, y_stride, value_stride,
    first_row: tl.int64, scale, inverse_scale,
    Q: tl.constexpr, SIGN: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Forward on int32 streams."""
    group, inside, row, column, mask = _tile(groups, row_groups, columns, BLOCK, EVEN)
    values = load_float(branch, _offsets(group, row, column, branch_stride, FLAT), mask)
    d = tl.load(a + _offsets(group, row, column, a_stride, FLAT), mask=mask, other=0)
    if center is not None:
        d -= tl.load(center + _offsets(group, row, column, center_stride, FLAT), mask=mask, other=0)
    integer, status = quantise(values, scale)
    if Q > 1:
        d, rest = floor_divide(d, Q, BITS)
        pack(packed, rest, group, groups, inside, BITS)
    new = integer + d * SIGN
    status = tl.where((new <= -LIMIT) | (new >= LIMIT), status | OVERFLOW_FLAG, status)
    tl.store(y + _offsets(group, row, column, y_stride, FLAT), new, mask=mask)
    store_value(value, new.to(tl.float32) * inverse_scale, _offsets(group, row, column, value_stride, FLAT), mask)
    tl.atomic_add(totals, tl.sum(checksums(new, first_row + row, column)), sem="relaxed")
    flags = tl.max(status)  # NON_FINITE never comes alone, so the largest is the union
    tl.atomic_or(totals + 1, flags.to(tl.int64), mask=flags != 0, sem="relaxed")


@triton.jit(do_not_specialize=_EXACT_COUNTS)
def uncouple_exact_kernel(
    y, branch, center, a, value, packed, totals,
    groups, row_groups, columns, y_stride, branch_stride, center_stride, a_stride, value_stride,
    first_row: tl.int64, scale, inverse_scale,
    Q: tl.constexpr, SIGN: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Inverse on int32 streams."""
    group, inside, row, column, mask = _tile(groups, row_groups, columns, BLOCK, EVEN)
    values = load_float(branch, _offsets(group, row, column, branch_stride, FLAT), mask)
    old = tl.load(y + _offsets(group, row, column, y_stride, FLAT), mask=mask, other=0)
    integer, _ = quantise(values, scale)
    old = (old - integer) * (SIGN * Q)
    for plane in tl.static_range(0, BITS, 8):
        old += unpack_part(packed, group, groups.to(tl.int64), inside, plane, min(8, BITS - plane))
    if center is not None:
        old += tl.load(center + _offsets(group, row, column, center_stride, FLAT), mask=mask, other=0)
    tl.store(a + _offsets(group, row, column, a_stride, FLAT), old, mask=mask)
    store_value(value, old.to(tl.float32) * inverse_scale, _offsets(group, row, column, value_stride, FLAT), mask)
    tl.atomic_add(totals, tl.sum(checksums(old, first_row + row, column)), sem="relaxed")


@triton.jit(do_not_specialize=_COUNTS)
def float_kernel(
    stream, branch, center, out, value, packed, totals,  # one argument list for all
    groups, row_groups, columns, stream_stride, branch_stride, center_stride, out_stride, value_stride,
    coefficient,
    INVERSE: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Forward and inverse on floating-point streams."""
    group, _, row, column, mask = _tile(groups, row_groups, columns, BLOCK, EVEN)
    values = load_float(branch, _offsets(group, row, column, branch_stride, FLAT), mask)
    old = load_float(stream, _offsets(group, row, column, stream_stride, FLAT), mask)
    factor = tl.full((BLOCK, LANES), coefficient, tl.float32)
    if INVERSE:
        new = tl.div_rn(old - values, factor)
        if center is not None:
            new += load_float(center, _offsets(group, row, column, center_stride, FLAT), mask)
    else:
        if center is not None:
            old -= load_float(center, _offsets(group, row, column, center_stride, FLAT), mask)
        new = values + old * factor
    stored, new = round_like(new, out)
    tl.store(out + _offsets(group, row, column, out_stride, FLAT), stored, mask=mask)
    store_value(value, new, _offsets(group, row, column, value_stride, FLAT), mask)
    if not INVERSE:
        flags = tl.max(tl.where(tl.abs(new) <= FP32_MAX, 0, NON_FINITE_FLAG))
        tl.atomic_or(totals + 1, flags.to(tl.int64), mask=flags != 0, sem="relaxed")


INTERPRETED: bool = not isinstance(couple_exact_kernel, triton.runtime.JITFunction)
"""Whether Triton took these kernels for its interpreter (TRITON_INTERPRET), which runs them on CPU tensors."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # a fused multiply-add would round differently from torch

# Smallest number of groups, groups a program takes. 256 groups with 4 warps are 16 elements a thread: two 16-byte loads
# of a 16-bit tensor in flight, and few programs whose atomics share one address. Below 256 such programs 132 SMs would
# not fill, so small tensors are cut finer. Reasoned, not measured.
BLOCKS = ((65536, 256), (0, 64))


class _Plan(NamedTuple):
    """What follows from shapes, dtypes and settings alone."""

    launch: Launch
    before: tuple[int, ...]
    """Scalars ahead of the number of the first row, which only integer streams have."""
    after: tuple[float, ...]


@remembered
def _plan(
    inverse: bool,
    shape: torch.Size,
    dtypes: tuple[torch.dtype | None, ...],
    device: torch.device,
    dense: bool,
    strides: tuple[int, ...],
    coefficient: float,
    exact: tuple[int, int] | None,
    fraction_bits: int | None,
    sizes: tuple[tuple[int, int], ...],
) -> _Plan:
    """Of tensors (stream, branch, center, out, value) of these dtypes; None for those that are not there.

    Args:
        dense: whether there are no gaps between rows, in any of them.
        strides: from row to row.
        sizes: ``BLOCKS``.
    """
    columns = shape[-1]
    rows = shape.numel() // columns
    # Remainders and checksums go by row: there, no group may straddle two.
    if flat := dense and (columns % GROUP == 0 or exact is None):
        strides = (0,) * len(dtypes)
        if exact is None:
            rows, columns = 1, rows * columns
    groups = rows * (row_groups := blocks(columns, GROUP))
    after: tuple[float, ...] = (float(coefficient),)
    constants: dict[str, int] = {"INVERSE": inverse}
    kernel: Any = float_kernel
    if exact is not None and fraction_bits is not None:
        after = (2.0**fraction_bits, 2.0**-fraction_bits)
        kernel = uncouple_exact_kernel if inverse else couple_exact_kernel
        constants = {"Q": exact[0], "SIGN": exact[1], "BITS": remainder_bits(exact[0])}
    block = next(size for least, size in sizes if groups >= least)
    constants |= {"BLOCK": block, "FLAT": flat, "EVEN": columns % GROUP == 0, **OPTIONS}
    launch = Launch(kernel, (blocks(groups, block),), constants, device)
    return _Plan(launch, (groups, row_groups, columns, *strides), after)


def _launch(
    inverse: bool,
    packed: torch.Tensor | None,
    stream: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    exact: tuple[int, int] | None,
    center: torch.Tensor | None,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    inplace: bool,
    first_row: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The new stream, its copy as ``value_dtype``, and the totals: checksum and status."""
    shape, device = stream.shape, stream.device
    native = value_dtype in NATIVE
    value = torch.empty(shape, dtype=value_dtype, device=device) if native else None
    out = stream if inplace else torch.empty(shape, dtype=stream.dtype, device=device)
    totals = torch.zeros(2, dtype=torch.int64, device=device)  # checksum and status, cleared by one memset
    if stream.numel():
        source = target = out
        if not inplace:
            source = stream
        elif not stream.is_contiguous():
            source = target = writable_rows(stream)
        tensors, strides = rows_of_all(source, branch, center, target, value)
        dense = all_dense(*tensors)
        dtypes = (
            stream.dtype, branch.dtype, None if center is None else center.dtype, out.dtype,
            value_dtype if native else None,
        )  # fmt: skip
        plan = _plan(inverse, shape, dtypes, device, dense, strides, coefficient, exact, fraction_bits, BLOCKS)
        row = () if exact is None else (first_row,)
        plan.launch((*tensors, packed, totals), (*plan.before, *row, *plan.after))
        if inplace:
            written(stream, target)
    if value is None and value_dtype is not None:  # float64, say
        k = fraction_bits
        value = out.contiguous().to(value_dtype) if k is None else reference.dequantise(out, k, value_dtype)
    return out, value, totals


@without_gradients
def couple(
    a: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    exact: tuple[int, int] | None,
    center: torch.Tensor | None,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    inplace: bool,
    first_row: int,
) -> Coupled:
    """``reference.couple_exact`` where ``exact`` is ``(q, sign)``, ``reference.couple_float`` where it is None."""
    packed = None
    if exact is not None and exact[0] > 1:
        packed = torch.empty(packed_shape(a.shape, exact[0]), dtype=torch.uint8, device=a.device)
    lane = (a, branch, coefficient, exact, center, fraction_bits, value_dtype, inplace, first_row)
    y, value, totals = _launch(False, packed, *lane)
    return Coupled(y, value, packed, totals[0], totals.view(torch.int32)[2])  # little-endian, as packing insists


@without_gradients
def uncouple(
    y: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    exact: tuple[int, int] | None,
    remainder: torch.Tensor | None,
    center: torch.Tensor | None,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    inplace: bool,
    first_row: int,
) -> Uncoupled:
    """``reference.uncouple_exact`` where ``exact`` is ``(q, sign)``, ``reference.uncouple_float`` where it is None."""
    packed = None if remainder is None else remainder.contiguous()
    lane = (y, branch, coefficient, exact, center, fraction_bits, value_dtype, inplace, first_row)
    a, value, totals = _launch(True, packed, *lane)
    return Uncoupled(a, value, totals[0])
