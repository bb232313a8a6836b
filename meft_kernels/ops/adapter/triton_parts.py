"""Pieces of the adapter kernels, and the tiles they run in.

Forward, inverse and backward compute the branch by the same functions, in the same tiles with the same number of warps:
a product's bits depend on the order of its sums, and the inverse must meet the bits of the forward.

A program takes BLOCK_M rows. Row numbers past the end repeat the last row, so loads need no mask for them; stores do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from ..kernel_parts import (
    FP32_MAX,
    LANES,
    LIMIT,
    NON_FINITE_FLAG,
    OVERFLOW_FLAG,
    checksums,
    dot,
    floor_divide,
    load_float,
    operand_pointer,
    pack,
    quantise,
    round_like,
    round_operand,
    store_value,
    unpack_part,
    widen,
)
from .types import GELU, GELU_TANH, RELU

_GELU, _GELU_TANH, _RELU = tl.constexpr(GELU), tl.constexpr(GELU_TANH), tl.constexpr(RELU)

COUNTS = ["rows", "seed", "threshold"]
"""Arguments that change from call to call and must not recompile anything."""


class Tile(NamedTuple):
    """How a kernel is cut."""

    block_m: int
    """Rows of a program."""
    block_k: int
    """Columns of a step of the product that fills the bottleneck."""
    block_h: int
    """Columns of a step of the output."""
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        """Launch options; a fused multiply-add would round differently from torch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


EVEN_COLUMNS = 64
"""Widths that are multiples of this need no mask along a row; every tile's steps divide it."""

# By padded rank, with no spills and at most 48 KiB of shared memory on sm_80 to sm_120. Those up to 64 were the fastest
# of eleven on an H200 (bfloat16, r = 64): half the time of tiles of 64 rows at 4096 x 4096, as few rows leave no
# multiprocessor idle, and no worse at 16384 x 768. The others, and float32's, are not measured.
TILES = {
    16: Tile(16, 64, 64, 8, 3),
    32: Tile(16, 64, 64, 8, 3),
    64: Tile(16, 64, 64, 8, 3),
    128: Tile(32, 64, 32, 4, 2),
    256: Tile(16, 32, 16, 8, 2),
}
TILES_FP32 = {
    16: Tile(32, 32, 32, 8, 2),
    32: Tile(32, 32, 32, 8, 2),
    64: Tile(32, 16, 16, 8, 2),
    128: Tile(16, 32, 16, 8, 2),
    256: Tile(16, 16, 8, 8, 2),
}
# Odd widths: masks and addresses of single elements take registers, so tiles are small.
ODD_TILES = {
    16: Tile(16, 16, 16, 4, 1),
    32: Tile(16, 16, 16, 4, 1),
    64: Tile(16, 16, 16, 4, 1),
    128: Tile(16, 16, 16, 4, 1),
    256: Tile(16, 16, 16, 8, 1),
}
ODD_TILES_FP32 = {
    16: Tile(32, 16, 16, 4, 1),
    32: Tile(32, 16, 16, 4, 1),
    64: Tile(16, 16, 16, 4, 1),
    128: Tile(16, 16, 8, 4, 1),
    256: Tile(16, 16, 16, 8, 1),
}


@functools.cache
def padded_rank(rank: int) -> int:
    """``tl.dot`` wants at least 16 columns, ``tl.arange`` a power of two."""
    return max(16, 1 << (rank - 1).bit_length())


def tile_for(rank: int, columns: int, *, narrow: bool) -> Tile:
    """The tile of every kernel that computes the branch, from the shape alone. ``narrow``: 16-bit hidden states."""
    if columns % EVEN_COLUMNS:
        return (ODD_TILES if narrow else ODD_TILES_FP32)[padded_rank(rank)]
    return (TILES if narrow else TILES_FP32)[padded_rank(rank)]


@triton.jit
def _sigmoid(values):
    return 1.0 / (1.0 + tl.exp(-values))  # exp may overflow to inf, and 1 / inf is right


@triton.jit
def _tanh_argument(pre):
    """Twice the argument of the tanh: (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    return 1.5957691216057308 * (pre + 0.044715 * pre * pre * pre)


@triton.jit
def activate(pre, ACT: tl.constexpr):
    """The activation in fp32; NaN stays NaN."""
    if ACT == _GELU:
        return 0.5 * pre * (1.0 + tl.erf(pre * 0.7071067811865476))
    if ACT == _GELU_TANH:
        return pre * _sigmoid(_tanh_argument(pre))
    if ACT == _RELU:
        return tl.where(pre <= 0, 0.0, pre)
    return pre * _sigmoid(pre)


@triton.jit
def activation_slope(pre, ACT: tl.constexpr):
    """Derivative of ``activate``."""
    if ACT == _GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * pre * pre)
        return 0.5 * (1.0 + tl.erf(pre * 0.7071067811865476)) + pre * density
    if ACT == _GELU_TANH:
        share = _sigmoid(_tanh_argument(pre))
        bend = share * (1.0 - share)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * pre * pre)
        return share + tl.where(bend == 0, 0.0, pre * bend * inner)  # inner may be inf where bend is 0
    if ACT == _RELU:
        return tl.where(pre <= 0, 0.0, tl.where(pre > 0, 1.0, pre))  # NaN stays NaN
    share = _sigmoid(pre)
    return share * (1.0 + pre * (1.0 - share))


@triton.jit
def keep_factor(row, seed, threshold, keep_scale, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Inverted dropout of a tile of the bottleneck: 0 or 1 / (1 - p)."""
    counter = row[:, None] * RANK + tl.arange(0, RANKS)[None, :]
    return tl.where(tl.randint(seed, counter).to(tl.int64) >= threshold, keep_scale, 0.0)


@triton.jit
def row_tile(rows, BLOCK_M: tl.constexpr):
    """First row of the program; the row of every line of its tile; which of them exist."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    return first, tl.minimum(row, rows - 1), row < rows


@triton.jit
def load_tile(pointers, row_mask, column_mask, FULL_ROWS: tl.constexpr, FULL_COLUMNS: tl.constexpr):
    """Load with only those masks that are needed."""
    if FULL_ROWS and FULL_COLUMNS:
        tile = tl.load(pointers)
    elif FULL_ROWS:
        tile = tl.load(pointers, mask=column_mask, other=0)
    elif FULL_COLUMNS:
        tile = tl.load(pointers, mask=row_mask, other=0)
    else:
        tile = tl.load(pointers, mask=row_mask & column_mask, other=0)
    return tile


@triton.jit
def preactivation(
    x, x_stride, down, down_bias, row, columns,
    RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``x @ down.T + down_bias`` in fp32, ``[BLOCK_M, RANKS]``; columns past RANK are 0."""
    rank = tl.arange(0, RANKS)
    step = tl.arange(0, BLOCK_K)
    lefts = operand_pointer(x) + row[:, None] * x_stride + step[None, :]
    rights = operand_pointer(down) + rank[None, :] * columns + step[:, None]
    sums = tl.zeros((BLOCK_M, RANKS), tl.float32)
    for start in range(0, columns, BLOCK_K):
        inside = start + step < columns
        left = load_tile(lefts + start, None, inside[None, :], True, EVEN)
        right = load_tile(rights + start, inside[:, None], (rank < RANK)[None, :], EVEN, RANK == RANKS)
        sums = dot(left, right, sums)
    sums += load_float(down_bias, rank, rank < RANK)[None, :]
    if RANK < RANKS:
        sums = tl.where((rank < RANK)[None, :], sums, 0.0)  # inf * 0 is NaN
    return sums


@triton.jit
def load_across(weights, columns, start, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
                EVEN: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """Columns ``start`` on of the weights as ``[RANKS, BLOCK]``: ``up.T`` (UP) or ``down``."""
    rank = tl.arange(0, RANKS)
    column = start + tl.arange(0, BLOCK)
    pointer = operand_pointer(weights)
    if UP:
        pointers = pointer + column[None, :] * RANK + rank[:, None]
    else:
        pointers = pointer + rank[:, None] * columns + column[None, :]
    return load_tile(pointers, (rank < RANK)[:, None], (column < columns)[None, :], RANK == RANKS, EVEN)


@triton.jit
def groups_of_eight(tile, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """``[BLOCK_M, BLOCK_H]`` as ``[groups, 8]``: what is packed together, and one 16-byte access of 16-bit values."""
    return tl.reshape(tile, (BLOCK_M * BLOCK_H // LANES, LANES))


@triton.jit
def element_tile(first, rows, start, columns, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr):
    """Row of every group, columns of its elements, mask, the group's number and whether it exists."""
    line_groups: tl.constexpr = BLOCK_H // LANES
    local = tl.arange(0, BLOCK_M * line_groups)
    row = first + local // line_groups
    column = start + (local % line_groups)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    inside = row < rows
    mask = inside[:, None]
    group_column = start // LANES + local % line_groups
    row_groups = (columns + (LANES - 1)) // LANES
    if not EVEN:
        mask = mask & (column < columns)
        inside = inside & (group_column < row_groups)
    return row, column, mask, row * row_groups + group_column, inside, rows * row_groups


@triton.jit
def branch_tile(
    z, x, x_stride, up, up_bias, row, column, mask, columns, start,
    RESIDUAL: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Columns ``start`` on of ``adapter(x) [+ x]``, rounded to the dtype of x, as fp32 ``[groups, 8]``."""
    offsets = start + tl.arange(0, BLOCK_H)
    sums = dot(z, load_across(up, columns, start, RANK, RANKS, BLOCK_H, EVEN, True),
               tl.zeros((BLOCK_M, BLOCK_H), tl.float32))  # fmt: skip
    sums += load_float(up_bias, offsets, offsets < columns)[None, :]
    stored, _ = round_like(sums, x)
    values = widen(groups_of_eight(stored, BLOCK_M, BLOCK_H))
    if RESIDUAL:
        values += load_float(x, row[:, None] * x_stride + column, mask)
        _, values = round_like(values, x)
    return values


@triton.jit
def couple_tile(
    values, stream, center, out, value, packed, row, column, mask, group, inside, groups,
    stream_stride, center_stride, out_stride, value_stride, scale, inverse_scale, coefficient,
    EXACT: tl.constexpr, INVERSE: tl.constexpr, Q: tl.constexpr, SIGN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One tile of the coupling step; by group, the checksum of the new stream (int64) and status flags.

    The same operations in the same order as the coupling kernels.
    """
    there = row[:, None] * stream_stride + column
    if EXACT:
        integer, status = quantise(values, scale)
        new = tl.load(stream + there, mask=mask, other=0)
        if INVERSE:
            new = (new - integer) * (SIGN * Q)
            for plane in tl.static_range(0, BITS, 8):
                new += unpack_part(packed, group, groups, inside, plane, min(8, BITS - plane))
            if center is not None:
                new += tl.load(center + row[:, None] * center_stride + column, mask=mask, other=0)
        else:
            if center is not None:
                new -= tl.load(center + row[:, None] * center_stride + column, mask=mask, other=0)
            if Q > 1:
                new, rest = floor_divide(new, Q, BITS)
                pack(packed, rest, group, groups, inside, BITS)
            new = integer + new * SIGN
            status = tl.where((new <= -LIMIT) | (new >= LIMIT), status | OVERFLOW_FLAG, status)
        tl.store(out + row[:, None] * out_stride + column, new, mask=mask)
        store_value(value, new.to(tl.float32) * inverse_scale, row[:, None] * value_stride + column, mask)
        sums = checksums(tl.where(mask, new, 0), row, column)
    else:
        new = load_float(stream, there, mask)
        if INVERSE:
            new = tl.div_rn(new - values, tl.zeros_like(new) + coefficient)
            if center is not None:
                new += load_float(center, row[:, None] * center_stride + column, mask)
        else:
            if center is not None:
                new -= load_float(center, row[:, None] * center_stride + column, mask)
            new = values + new * coefficient
        stored, new = round_like(new, out)
        tl.store(out + row[:, None] * out_stride + column, stored, mask=mask)
        store_value(value, new, row[:, None] * value_stride + column, mask)
        status = tl.where(tl.abs(new) <= FP32_MAX, 0, NON_FINITE_FLAG)
        sums = tl.zeros_like(group)
    return sums, tl.max(tl.where(mask, status, 0), axis=1)


@triton.jit
def bottleneck_flags(pre, exists, EXACT: tl.constexpr):
    """Status of the bottleneck: relu turns -inf into 0, so what comes of it does not tell all."""
    non_finite: tl.constexpr = NON_FINITE_FLAG | OVERFLOW_FLAG if EXACT else NON_FINITE_FLAG
    fine = (tl.abs(pre) <= FP32_MAX) | (exists[:, None] == 0)
    return tl.max(tl.max(tl.where(fine, 0, non_finite), axis=1), axis=0)


@triton.jit
def add_totals(totals, sums, flags, flag, EXACT: tl.constexpr, INVERSE: tl.constexpr):
    """One atomic for the checksum; one for the status, if there is something to tell."""
    if EXACT:
        tl.atomic_add(totals, tl.sum(sums), sem="relaxed")
    if not INVERSE:
        flag = tl.maximum(flag, tl.max(flags))  # NON_FINITE never comes alone, so the largest is the union
        tl.atomic_or(totals + 1, flag.to(tl.int64), mask=flag != 0, sem="relaxed")


@triton.jit
def hidden(pre, like, row, seed, threshold, keep_scale, ACT: tl.constexpr, DROPOUT: tl.constexpr,
           RANK: tl.constexpr, RANKS: tl.constexpr):  # fmt: skip
    """``z`` as an operand of ``dot``, in the dtype that ``like`` points to."""
    z = activate(pre, ACT)
    if DROPOUT:
        z *= keep_factor(row, seed, threshold, keep_scale, RANK, RANKS)
    return round_operand(z, like)
