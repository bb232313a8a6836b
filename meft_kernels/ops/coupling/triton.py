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

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from . import reference
from .packing import GROUP, packed_shape, remainder_bits
from .types import INT_LIMIT, NON_FINITE, OVERFLOW, Coupled, Uncoupled

_LANES = tl.constexpr(GROUP)
_LIMIT = tl.constexpr(INT_LIMIT)
_OVERFLOW, _NON_FINITE = tl.constexpr(OVERFLOW), tl.constexpr(NON_FINITE)
_FP32_MAX = tl.constexpr(3.4028234663852886e38)
_FP32_INTEGERS = tl.constexpr(8388608.0)  # 2^23: an fp32 of this size or more has no fraction


@triton.jit
def _tile(groups, row_groups, columns, BLOCK: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr):
    """Groups of eight neighbours that this program owns: their number, row, the columns of their elements, masks."""
    # FLAT: every tensor is dense and no group straddles rows, so `column` is the address. EVEN: no group is cut off;
    # the mask is then constant along a group, which lets loads be vectorised.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    lane = tl.arange(0, _LANES)[None, :]
    group = start + local
    inside = group < groups
    row = group
    if FLAT:
        column = group[:, None] * _LANES + lane
    else:
        # One 64-bit division a program, 32-bit ones a group: a 64-bit division costs some hundred instructions.
        first = start // row_groups
        local = (start - first * row_groups).to(tl.int32) + local
        row = first + local // row_groups
        column = (local % row_groups).to(tl.int64)[:, None] * _LANES + lane
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (column < columns)
    return group, inside, row, column, mask


@triton.jit
def _offsets(row, column, stride, FLAT: tl.constexpr):
    if FLAT:
        return column
    return row[:, None] * stride + column


@triton.jit
def _load_float(pointer, offsets, mask):
    """fp32 values of an fp32, fp16 or (as int16 bits) bf16 tensor."""
    values = tl.load(pointer + offsets, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.int16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def _round_like(values, pointer):
    """fp32 values as the tensor behind `pointer` stores them, and what is then read back, in fp32."""
    if pointer.dtype.element_ty == tl.int16:
        bits = values.to(tl.uint32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(is_nan, 0x7FC0, bits)  # the carry would turn some NaNs into zero
        return bits.to(tl.int16), (bits << 16).to(tl.float32, bitcast=True)
    stored = values.to(pointer.dtype.element_ty)
    return stored, stored.to(tl.float32)


@triton.jit
def _quantise(values, scale):
    """round(values * scale) to nearest even, as int32, and status flags per element; 0 where it does not fit."""
    scaled = values * scale
    magnitude = tl.abs(scaled)
    fits = magnitude < _LIMIT  # false for NaN
    status = tl.where(fits, 0, tl.where(magnitude <= _FP32_MAX, _OVERFLOW, _OVERFLOW | _NON_FINITE))
    magnitude = tl.where(fits, magnitude, 0.0)
    # No rint in the interpreter: adding 2^23 leaves no room for a fraction, so the adder itself rounds to nearest even.
    magnitude = tl.where(magnitude < _FP32_INTEGERS, (magnitude + _FP32_INTEGERS) - _FP32_INTEGERS, magnitude)
    integer = magnitude.to(tl.int32)
    return tl.where(scaled < 0, -integer, integer), status


@triton.jit
def _floor_divide(d, Q: tl.constexpr, BITS: tl.constexpr):
    """Floor division by Q >= 2 and its remainder in [0, Q)."""
    if Q == 1 << BITS:
        return d >> BITS, d & (Q - 1)
    # `//` truncates in compiled code; on non-negative numbers truncation and floor agree, and ~d = -1 - d cannot wrap.
    quotient = tl.where(d < 0, ~d, d) // Q
    quotient = tl.where(d < 0, ~quotient, quotient)
    return quotient, d - quotient * Q


@triton.jit
def _pack_part(packed, part, group, groups, inside, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    if WIDTH > 4:
        part = part.to(tl.int64)
    word = tl.sum(part << (tl.arange(0, _LANES)[None, :] * WIDTH), axis=1)  # disjoint bits: the sum is their union
    for byte in tl.static_range(WIDTH):
        tl.store(packed + (PLANE + byte) * groups + group, (word >> (8 * byte)).to(tl.uint8), mask=inside)


@triton.jit
def _pack(packed, rest, group, groups, inside, BITS: tl.constexpr):
    for plane in tl.static_range(0, BITS, 8):
        part = (rest >> plane) & 0xFF
        _pack_part(packed, part, group, groups.to(tl.int64), inside, plane, min(8, BITS - plane))


@triton.jit
def _unpack_part(packed, group, groups, inside, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    word = tl.load(packed + PLANE * groups + group, mask=inside, other=0).to(tl.int64 if WIDTH > 4 else tl.int32)
    for byte in tl.static_range(1, WIDTH):
        value = tl.load(packed + (PLANE + byte) * groups + group, mask=inside, other=0)
        word = word | (value.to(word.dtype) << (8 * byte))
    lanes = word[:, None] >> (tl.arange(0, _LANES)[None, :] * WIDTH)
    return (lanes & ((1 << WIDTH) - 1)).to(tl.int32) << PLANE


@triton.jit
def _store_value(value, values, row, column, stride, mask, FLAT: tl.constexpr):
    if value is not None:
        stored, _ = _round_like(values, value)
        tl.store(value + _offsets(row, column, stride, FLAT), stored, mask=mask)


# Row counts change from batch to batch and must not recompile anything; strides are properties of the model, and their
# divisibility by 16 is what vectorises loads.
_COUNTS = ["groups", "row_groups", "columns"]


@triton.jit(do_not_specialize=_COUNTS)
def couple_exact_kernel(
    a, branch, center, y, value, packed, totals,
    groups, row_groups, columns, a_stride, branch_stride, center_stride, y_stride, value_stride,
    scale, inverse_scale,
    Q: tl.constexpr, SIGN: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Forward on int32 streams."""
    group, inside, row, column, mask = _tile(groups, row_groups, columns, BLOCK, FLAT, EVEN)
    values = _load_float(branch, _offsets(row, column, branch_stride, FLAT), mask)
    d = tl.load(a + _offsets(row, column, a_stride, FLAT), mask=mask, other=0)
    if center is not None:
        d -= tl.load(center + _offsets(row, column, center_stride, FLAT), mask=mask, other=0)
    integer, status = _quantise(values, scale)
    if Q > 1:
        d, rest = _floor_divide(d, Q, BITS)
        _pack(packed, rest, group, groups, inside, BITS)
    new = integer + d * SIGN
    status = tl.where((new <= -_LIMIT) | (new >= _LIMIT), status | _OVERFLOW, status)
    tl.store(y + _offsets(row, column, y_stride, FLAT), new, mask=mask)
    _store_value(value, new.to(tl.float32) * inverse_scale, row, column, value_stride, mask, FLAT)
    tl.atomic_add(totals, tl.sum(new.to(tl.int64)), sem="relaxed")
    flags = tl.max(status)  # NON_FINITE never comes alone, so the largest is the union
    tl.atomic_or(totals + 1, flags.to(tl.int64), mask=flags != 0, sem="relaxed")


@triton.jit(do_not_specialize=_COUNTS)
def uncouple_exact_kernel(
    y, branch, center, a, value, packed, totals,
    groups, row_groups, columns, y_stride, branch_stride, center_stride, a_stride, value_stride,
    scale, inverse_scale,
    Q: tl.constexpr, SIGN: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Inverse on int32 streams."""
    group, inside, row, column, mask = _tile(groups, row_groups, columns, BLOCK, FLAT, EVEN)
    values = _load_float(branch, _offsets(row, column, branch_stride, FLAT), mask)
    old = tl.load(y + _offsets(row, column, y_stride, FLAT), mask=mask, other=0)
    integer, _ = _quantise(values, scale)
    old = (old - integer) * (SIGN * Q)
    for plane in tl.static_range(0, BITS, 8):
        old += _unpack_part(packed, group, groups.to(tl.int64), inside, plane, min(8, BITS - plane))
    if center is not None:
        old += tl.load(center + _offsets(row, column, center_stride, FLAT), mask=mask, other=0)
    tl.store(a + _offsets(row, column, a_stride, FLAT), old, mask=mask)
    _store_value(value, old.to(tl.float32) * inverse_scale, row, column, value_stride, mask, FLAT)
    tl.atomic_add(totals, tl.sum(old.to(tl.int64)), sem="relaxed")


@triton.jit(do_not_specialize=_COUNTS)
def float_kernel(
    stream, branch, center, out, value, packed, totals,  # one argument list for all
    groups, row_groups, columns, stream_stride, branch_stride, center_stride, out_stride, value_stride,
    coefficient,
    INVERSE: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Forward and inverse on floating-point streams."""
    _, _, row, column, mask = _tile(groups, row_groups, columns, BLOCK, FLAT, EVEN)
    values = _load_float(branch, _offsets(row, column, branch_stride, FLAT), mask)
    old = _load_float(stream, _offsets(row, column, stream_stride, FLAT), mask)
    factor = tl.full((BLOCK, _LANES), coefficient, tl.float32)
    if INVERSE:
        new = tl.div_rn(old - values, factor)
        if center is not None:
            new += _load_float(center, _offsets(row, column, center_stride, FLAT), mask)
    else:
        if center is not None:
            old -= _load_float(center, _offsets(row, column, center_stride, FLAT), mask)
        new = values + old * factor
    stored, new = _round_like(new, out)
    tl.store(out + _offsets(row, column, out_stride, FLAT), stored, mask=mask)
    _store_value(value, new, row, column, value_stride, mask, FLAT)
    if not INVERSE:
        flags = tl.max(tl.where(tl.abs(new) <= _FP32_MAX, 0, _NON_FINITE))
        tl.atomic_or(totals + 1, flags.to(tl.int64), mask=flags != 0, sem="relaxed")


INTERPRETED: bool = not isinstance(couple_exact_kernel, triton.runtime.JITFunction)
"""Whether Triton took these kernels for its interpreter (TRITON_INTERPRET), which runs them on CPU tensors."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # a fused multiply-add would round differently from torch

# Smallest number of groups, groups a program takes. 256 groups with 4 warps are 16 elements a thread: two 16-byte loads
# of a 16-bit tensor in flight, and few programs whose atomics share one address. Below 256 such programs 132 SMs would
# not fill, so small tensors are cut finer. Reasoned, not measured.
BLOCKS = ((65536, 256), (0, 64))


def _bits(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.view(torch.int16) if tensor is not None and tensor.dtype == torch.bfloat16 else tensor


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as rows of its last dimension with unit stride in it: a view where there is one, else a copy."""
    columns = tensor.shape[-1]
    if columns == 1 or tensor.stride(-1) == 1:
        with contextlib.suppress(RuntimeError):
            return tensor.view(-1, columns)
    return tensor.contiguous().view(-1, columns)


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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The new stream, its copy as ``value_dtype``, checksum and status."""
    native = value_dtype in (torch.float32, torch.float16, torch.bfloat16)
    value = torch.empty(stream.shape, dtype=value_dtype, device=stream.device) if native else None
    out = stream if inplace else torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
    totals = torch.zeros(2, dtype=torch.int64, device=stream.device)  # checksum and status, cleared by one memset
    if stream.numel():
        source = _rows(stream)
        if inplace and source.shape[0] > 1 and source.stride(0) < source.shape[1]:
            source = stream.contiguous().view(source.shape)  # expanded: torch's copy_ below refuses to write it
        target = source if inplace else _rows(out)
        tensors = [None if tensor is None else _rows(tensor) for tensor in (source, branch, center, target, value)]

        rows, columns = source.shape
        dense = all(tensor is None or tensor.is_contiguous() for tensor in tensors)
        if flat := dense and (columns % GROUP == 0 or packed is None):
            rows, columns = 1, rows * columns
        groups = rows * (row_groups := -(-columns // GROUP))
        strides = [0 if flat or tensor is None else tensor.stride(0) for tensor in tensors]

        scalars: tuple[float, ...] = (coefficient,)
        constants: dict[str, int] = {"INVERSE": inverse}
        kernel: Any = float_kernel
        if exact is not None and fraction_bits is not None:
            scalars = (2.0**fraction_bits, 2.0**-fraction_bits)
            kernel = uncouple_exact_kernel if inverse else couple_exact_kernel
            constants = {"Q": exact[0], "SIGN": exact[1], "BITS": remainder_bits(exact[0])}
        block = next(size for least, size in BLOCKS if groups >= least)
        with torch.cuda.device(stream.device) if stream.is_cuda else contextlib.nullcontext():
            kernel[(-(-groups // block),)](
                *map(_bits, tensors), packed, totals, groups, row_groups, columns, *strides, *scalars,
                **constants, BLOCK=block, FLAT=flat, EVEN=columns % GROUP == 0, **OPTIONS,
            )  # fmt: skip
        if inplace and target.data_ptr() != stream.data_ptr():
            stream.copy_(target.view(stream.shape))
        elif inplace and not stream.is_inference():
            torch.autograd.graph.increment_version(stream)  # autograd cannot see a kernel write
    if value is None and value_dtype is not None:  # float64, say
        k = fraction_bits
        value = out.contiguous().to(value_dtype) if k is None else reference.dequantise(out, k, value_dtype)
    return out, value, totals[0], totals.view(torch.int32)[2]  # little-endian, as packing insists


@torch.no_grad()
def couple(
    a: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    exact: tuple[int, int] | None,
    center: torch.Tensor | None,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    inplace: bool,
) -> Coupled:
    """``reference.couple_exact`` where ``exact`` is ``(q, sign)``, ``reference.couple_float`` where it is None."""
    packed = None
    if exact is not None and exact[0] > 1:
        packed = torch.empty(packed_shape(a.shape, exact[0]), dtype=torch.uint8, device=a.device)
    lane = (a, branch, coefficient, exact, center, fraction_bits, value_dtype, inplace)
    y, value, checksum, status = _launch(False, packed, *lane)
    return Coupled(y, value, packed, checksum, status)


@torch.no_grad()
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
) -> Uncoupled:
    """``reference.uncouple_exact`` where ``exact`` is ``(q, sign)``, ``reference.uncouple_float`` where it is None."""
    packed = None if remainder is None else remainder.contiguous()
    lane = (y, branch, coefficient, exact, center, fraction_bits, value_dtype, inplace)
    a, value, checksum, _ = _launch(True, packed, *lane)
    return Uncoupled(a, value, checksum)
