"""What the Triton kernels of several ops share: loads and rounding, fixed point, packed remainders, views of rows.

bfloat16 tensors travel as int16 bit patterns, widened and rounded (to nearest even) by integer operations: Triton's
interpreter truncates its own bf16 casts, and integers round alike everywhere.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .coupling.checksum import FACTOR
from .coupling.packing import GROUP
from .coupling.types import INT_LIMIT, NON_FINITE, OVERFLOW
from .launching import all_dense, as_bits

NATIVE = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that kernels write."""

LANES = tl.constexpr(GROUP)
LIMIT = tl.constexpr(INT_LIMIT)
OVERFLOW_FLAG, NON_FINITE_FLAG = tl.constexpr(OVERFLOW), tl.constexpr(NON_FINITE)
FP32_MAX = tl.constexpr(3.4028234663852886e38)
_FACTOR = tl.constexpr(FACTOR)
_FP32_INTEGERS = tl.constexpr(8388608.0)  # 2^23: an fp32 of this size or more has no fraction
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_float(pointer, offsets, mask):
    """fp32 values of an fp32, fp16 or (as int16 bits) bf16 tensor."""
    values = tl.load(pointer + offsets, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.int16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def round_like(values, pointer):
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
def quantise(values, scale):
    """round(values * scale) to nearest even, as int32, and status flags per element; 0 where it does not fit."""
    scaled = values * scale
    magnitude = tl.abs(scaled)
    fits = magnitude < LIMIT  # false for NaN
    status = tl.where(fits, 0, tl.where(magnitude <= FP32_MAX, OVERFLOW_FLAG, OVERFLOW_FLAG | NON_FINITE_FLAG))
    magnitude = tl.where(fits, magnitude, 0.0)
    # No rint in the interpreter: adding 2^23 leaves no room for a fraction, so the adder itself rounds to nearest even.
    magnitude = tl.where(magnitude < _FP32_INTEGERS, (magnitude + _FP32_INTEGERS) - _FP32_INTEGERS, magnitude)
    integer = magnitude.to(tl.int32)
    return tl.where(scaled < 0, -integer, integer), status


@triton.jit
def floor_divide(d, Q: tl.constexpr, BITS: tl.constexpr):
    """Floor division by Q >= 2 and its remainder in [0, Q)."""
    if Q == 1 << BITS:
        return d >> BITS, d & (Q - 1)
    # `//` truncates in compiled code; on non-negative numbers truncation and floor agree, and ~d = -1 - d cannot wrap.
    quotient = tl.where(d < 0, ~d, d) // Q
    quotient = tl.where(d < 0, ~quotient, quotient)
    return quotient, d - quotient * Q


@triton.jit
def pack_part(packed, part, group, groups, inside, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH <= 8 bits of every remainder, ``[groups, 8]``, into the planes from PLANE on."""
    if WIDTH > 4:
        part = part.to(tl.int64)
    word = tl.sum(part << (tl.arange(0, LANES)[None, :] * WIDTH), axis=1)  # disjoint bits: the sum is their union
    for byte in tl.static_range(WIDTH):
        tl.store(packed + (PLANE + byte) * groups + group, (word >> (8 * byte)).to(tl.uint8), mask=inside)


@triton.jit
def pack(packed, rest, group, groups, inside, BITS: tl.constexpr):
    """Remainders ``[groups, 8]`` of BITS bits into their planes."""
    for plane in tl.static_range(0, BITS, 8):
        part = (rest >> plane) & 0xFF
        pack_part(packed, part, group, groups.to(tl.int64), inside, plane, min(8, BITS - plane))


@triton.jit
def unpack_part(packed, group, groups, inside, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    """What ``pack_part`` stored, at its place in the remainder."""
    word = tl.load(packed + PLANE * groups + group, mask=inside, other=0).to(tl.int64 if WIDTH > 4 else tl.int32)
    for byte in tl.static_range(1, WIDTH):
        value = tl.load(packed + (PLANE + byte) * groups + group, mask=inside, other=0)
        word = word | (value.to(word.dtype) << (8 * byte))
    lanes = word[:, None] >> (tl.arange(0, LANES)[None, :] * WIDTH)
    return (lanes & ((1 << WIDTH) - 1)).to(tl.int32) << PLANE


@triton.jit
def store_value(value, values, offsets, mask):
    """fp32 values into the copy of a stream, if one is wanted."""
    if value is not None:
        stored, _ = round_like(values, value)
        tl.store(value + offsets, stored, mask=mask)


@triton.jit
def place_weight(place):
    """``coupling.checksum.weights`` of places of any integer dtype, widened; times an int32 it is one instruction."""
    hashed = place.to(tl.int32) * _FACTOR
    return ((hashed ^ (hashed >> 15)) | 1).to(tl.int64)


@triton.jit
def checksums(stream, row, column):
    """By group of ``[groups, 8]``, what it adds to the stream's checksum; 0 where the stream is masked to 0."""
    sums = tl.sum(stream.to(tl.int64) * place_weight(column), axis=1)
    return sums * place_weight(~row)


@triton.jit
def operand_pointer(pointer):
    """A pointer whose loads can be operands of ``dot``."""
    if not _INTERPRETED and pointer.dtype.element_ty == tl.int16:
        pointer = pointer.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    return pointer


@triton.jit
def round_operand(values, pointer):
    """fp32 values rounded to what ``pointer`` points to, as an operand of ``dot``."""
    stored, _ = round_like(values, pointer)
    if not _INTERPRETED and pointer.dtype.element_ty == tl.int16:
        stored = stored.to(tl.bfloat16, bitcast=True)
    return stored


@triton.jit
def dot(left, right, sums):
    """``sums + left @ right`` in fp32; both operands of one dtype."""
    if _INTERPRETED:  # numpy knows no bf16
        left, right = widen(left), widen(right)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def widen(values):
    """fp32 of fp32, fp16, bf16 or (int16) bf16 bits."""
    if values.dtype == tl.int16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


def blocks(size: int, block: int) -> int:
    """How many blocks hold ``size`` (``triton.cdiv`` takes ten times as long)."""
    return -(-size // block)


class Rows(NamedTuple):
    """A tensor as kernels take it: rows of its last dimension, ``stride`` elements apart; (None, 0) for none."""

    tensor: torch.Tensor | None
    stride: int


def rows_of(tensor: torch.Tensor | None) -> Rows:
    """bfloat16 as bits. What is dense stays as it is: kernels see an address, and every view costs microseconds."""
    if tensor is None:
        return Rows(None, 0)
    if tensor.is_contiguous():
        return Rows(as_bits(tensor), tensor.shape[-1])
    rows = as_rows(tensor)
    return Rows(as_bits(rows), rows.stride(0))


def rows_of_all(*tensors: torch.Tensor | None) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """Tensors as kernels take them, and their strides: those that are dense as they are, if all are."""
    if all_dense(*tensors):
        return tensors, tuple([0 if tensor is None else tensor.shape[-1] for tensor in tensors])
    rows, strides = zip(*map(rows_of, tensors), strict=True)
    return rows, strides


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as rows of its last dimension with unit stride in it: a view where there is one, else a copy."""
    columns = tensor.shape[-1]
    if columns == 1 or tensor.stride(-1) == 1:
        with contextlib.suppress(RuntimeError):
            return tensor.view(-1, columns)
    return tensor.contiguous().view(-1, columns)


def writable_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows to write to: the tensor itself if it is dense, or a view where there is one; see ``written``."""
    if tensor.is_contiguous():
        return tensor
    rows = as_rows(tensor)
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        return tensor.contiguous().view(rows.shape)  # expanded: torch's copy_ will refuse to write it
    return rows


def written(tensor: torch.Tensor, rows: torch.Tensor) -> None:
    """To be called when a kernel has written ``rows``, the ``writable_rows`` of a caller's tensor."""
    if rows is not tensor and rows.data_ptr() != tensor.data_ptr():
        tensor.copy_(rows.view(tensor.shape))
    elif not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)  # autograd cannot see a kernel write
