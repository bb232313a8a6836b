"""The adapter's fused backward kernels.

Bytes per element of the hidden states, s and k as in ``triton_forward``:

    kernel               reads                                                         writes
    backward             x s, dy s twice (skip or not), [dx_into s]                    dx s
    uncouple + backward  y 4, center 4, x s, dy s, dx_into s, remainder k/8            a 4, dx s, value s
    weights              x s, dy s                                                     2 r / rows-of-a-split fp32
    sum of the splits    that workspace                                                weights

To these come z and the bottleneck's gradient, 4 s r / H in all, and 16 r / rows a split for the workspace. Exact,
bf16, coefficient 1, bare adapter: 16 bytes for the first kernel (y 4, a 4, x 2, dy 2, dx 2 + 2), which is the floor,
and 4 for the second reading of x and dy: weight gradients need a bottleneck that is known only after a whole row.
``skip`` and ``residual`` read dy and x once more, from L2 mostly. Counted by ``benchmarks.byte_account`` (256 x 512,
r = 8): 21.5 bytes, 33 % over the floor, at 8.9 flops a byte.

No float is added atomically. The rows are split by the shape alone and the splits added in their order, so gradients
are the same bits in every run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..kernel_parts import (
    LANES,
    blocks,
    dot,
    load_float,
    operand_pointer,
    round_like,
    round_operand,
    rows_of_all,
    widen,
    writable_rows,
    written,
)
from ..launching import Launch, remembered, without_gradients
from .triton_forward import (
    StreamTensors,
    branch_constants,
    cast_weights,
    dropout_scalars,
    lane_constants,
    lane_scalars,
    tile_of,
)
from .triton_parts import (
    COUNTS,
    Tile,
    activate,
    activation_slope,
    add_totals,
    branch_tile,
    couple_tile,
    element_tile,
    groups_of_eight,
    keep_factor,
    load_across,
    load_tile,
    padded_rank,
    preactivation,
    row_tile,
)
from .types import AdapterWeights, Coupling

# By padded rank, as TILES: rows of a step, columns of a program, warps.
WEIGHT_TILES = {
    16: Tile(64, 0, 64, 4, 2),
    32: Tile(64, 0, 64, 4, 2),
    64: Tile(64, 0, 64, 4, 2),
    128: Tile(32, 0, 32, 4, 2),
    256: Tile(16, 0, 16, 4, 2),
}
WEIGHT_TILES_FP32 = {
    16: Tile(16, 0, 32, 4, 2),
    32: Tile(16, 0, 32, 4, 2),
    64: Tile(16, 0, 32, 4, 2),
    128: Tile(16, 0, 32, 8, 2),
    256: Tile(16, 0, 16, 8, 1),  # another stage spills on sm_100
}
PROGRAMS = 256
"""Programs that the weight gradients are split into, about: two a multiprocessor of the largest GPUs."""
MIN_ROWS = 256
"""Fewest rows of a split: each costs 8 r bytes a column of workspace."""
SUM_BLOCK = 1024


@triton.jit(do_not_specialize=COUNTS)
def adapter_backward_kernel(
    dy, x, down, down_bias, up, up_bias, into, dx, z_rows, d_pre_rows,
    stream, center, out, value, packed, totals,
    rows: tl.int64, columns, dy_stride, x_stride, into_stride, dx_stride,
    stream_stride, center_stride, out_stride, value_stride,
    seed: tl.int64, threshold: tl.int64, keep_scale, scale, inverse_scale, coefficient, skip,
    LANE: tl.constexpr, SKIP: tl.constexpr,
    EXACT: tl.constexpr, INVERSE: tl.constexpr, Q: tl.constexpr, SIGN: tl.constexpr, BITS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACT: tl.constexpr, DROPOUT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``dx = [into +] d adapter(x) / dx * dy [+ skip * dy]``, z, the bottleneck's gradient; LANE: the inverse too."""
    first, row, exists = row_tile(rows, BLOCK_M)
    rank = tl.arange(0, RANKS)
    pre = preactivation(x, x_stride, down, down_bias, row, columns, RANK, RANKS, BLOCK_M, BLOCK_K, EVEN)
    z = activate(pre, ACT)
    slope = activation_slope(pre, ACT)
    if DROPOUT:
        factor = keep_factor(row, seed, threshold, keep_scale, RANK, RANKS)
        z *= factor
        slope *= factor
    bottleneck = (first + tl.arange(0, BLOCK_M))[:, None] * RANK + rank[None, :]
    stored_mask = exists[:, None] & (rank < RANK)[None, :]
    z_stored, _ = round_like(z, z_rows)
    tl.store(z_rows + bottleneck, z_stored, mask=stored_mask)

    gradient = tl.zeros((BLOCK_M, RANKS), tl.float32)
    step = tl.arange(0, BLOCK_K)
    lefts = operand_pointer(dy) + row[:, None] * dy_stride + step[None, :]
    rights = operand_pointer(up) + step[:, None] * RANK + rank[None, :]
    for start in range(0, columns, BLOCK_K):
        inside = start + step < columns
        left = load_tile(lefts + start, None, inside[None, :], True, EVEN)
        right = load_tile(rights + start * RANK, inside[:, None], (rank < RANK)[None, :], EVEN, RANK == RANKS)
        gradient = dot(left, right, gradient)
    gradient *= slope
    d_pre_stored, _ = round_like(gradient, d_pre_rows)
    tl.store(d_pre_rows + bottleneck, d_pre_stored, mask=stored_mask)
    d_pre = round_operand(gradient, x)

    if LANE:
        z = round_operand(z, x)
        sums = tl.zeros((BLOCK_M * BLOCK_H // LANES,), tl.int64)
        flags = tl.zeros((BLOCK_M * BLOCK_H // LANES,), tl.int32)
    for start in range(0, columns, BLOCK_H):
        line, column, mask, group, inside, groups = element_tile(first, rows, start, columns, BLOCK_M, BLOCK_H, EVEN)
        if LANE:
            values = branch_tile(z, x, x_stride, up, up_bias, line, column, mask, columns, start,
                                 RESIDUAL, RANK, RANKS, BLOCK_M, BLOCK_H, EVEN)  # fmt: skip
            more_sums, _flags = couple_tile(
                values, stream, center, out, value, packed, line, column, mask, group, inside, groups,
                stream_stride, center_stride, out_stride, value_stride, scale, inverse_scale, coefficient,
                EXACT, INVERSE, Q, SIGN, BITS,
            )  # fmt: skip
            sums += more_sums
        product = dot(d_pre, load_across(down, columns, start, RANK, RANKS, BLOCK_H, EVEN, False),
                      tl.zeros((BLOCK_M, BLOCK_H), tl.float32))  # fmt: skip
        total = groups_of_eight(product, BLOCK_M, BLOCK_H)
        if SKIP:
            total += load_float(dy, line[:, None] * dy_stride + column, mask) * skip
        if into is not None:
            total += load_float(into, line[:, None] * into_stride + column, mask)
        rounded, _wide = round_like(total, dx)
        tl.store(dx + line[:, None] * dx_stride + column, rounded, mask=mask)
    if LANE:
        add_totals(totals, sums, flags, 0, EXACT, INVERSE)


@triton.jit
def _products(
    left, right, left_stride, right_stride, left_inside, right_inside, begin, end,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``left.T @ right`` and the column sums of ``left`` over rows [begin, end), in fp32."""
    products = tl.zeros((LEFT, RIGHT), tl.float32)
    # Element by element, so that no reduction crosses threads in the loop. Not by a product with ones: Triton 3.6 for
    # Hopper has wgmma read such a constant past the end of shared memory (compute-sanitizer on an H200).
    sums = tl.zeros((BLOCK_M, LEFT), tl.float32)
    lefts = operand_pointer(left) + tl.arange(0, LEFT)[None, :]
    rights = operand_pointer(right) + tl.arange(0, RIGHT)[None, :]
    for start in range(begin, end, BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M))[:, None]
        lines = tl.load(lefts + row * left_stride, mask=(row < end) & left_inside[None, :], other=0)
        others = tl.load(rights + row * right_stride, mask=(row < end) & right_inside[None, :], other=0)
        products = dot(tl.trans(lines), others, products)
        sums += widen(lines)
    return products, tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["rows", "split_rows"])
def adapter_weights_kernel(
    dy, x, z_rows, d_pre_rows, partial,
    rows: tl.int64, split_rows: tl.int64, columns, size, dy_stride, x_stride,
    RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One split's sums, laid out as down, down_bias, up, up_bias; grid (column blocks, splits, down or up)."""
    begin = tl.program_id(1) * split_rows
    end = tl.minimum(begin + split_rows, rows)
    partial += tl.program_id(1) * (2 * size + RANK + columns)
    rank = tl.arange(0, RANKS)
    column = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(0) * BLOCK_H
    wanted, inside = rank < RANK, column < columns
    if tl.program_id(2) == 0:
        products, sums = _products(d_pre_rows, x + first, RANK, x_stride, wanted, inside, begin, end,
                                   RANKS, BLOCK_H, BLOCK_M)  # fmt: skip
        tl.store(partial + rank[:, None] * columns + column[None, :], products, mask=wanted[:, None] & inside[None, :])
        tl.store(partial + size + rank, sums, mask=rank < tl.where(first == 0, RANK, 0))
    else:
        up_products, up_sums = _products(dy + first, z_rows, dy_stride, RANK, inside, wanted, begin, end,
                                   BLOCK_H, RANKS, BLOCK_M)  # fmt: skip
        up_partial = partial + size + RANK
        tl.store(
            up_partial + column[:, None] * RANK + rank[None, :], up_products, mask=inside[:, None] & wanted[None, :]
        )
        tl.store(up_partial + size + column, up_sums, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(partial, out, total, splits, BLOCK: tl.constexpr):
    """``out[i] = partial[0, i] + partial[1, i] + ...``, in this order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    sums = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        sums += tl.load(partial + index, mask=inside, other=0)
        partial += total
    stored, _ = round_like(sums, out)
    tl.store(out + index, stored, mask=inside)


def row_splits(rows: int, columns: int, tile: Tile) -> tuple[int, int]:
    """Number of splits and rows of each, from the shape alone: another GPU must not change a gradient's bits."""
    wanted = max(1, min(PROGRAMS // (2 * blocks(columns, tile.block_h)), blocks(rows, MIN_ROWS)))
    split_rows = blocks(blocks(rows, wanted), tile.block_m) * tile.block_m
    return blocks(rows, split_rows), split_rows


class _Sums(NamedTuple):
    """How weight gradients are summed up."""

    products: Launch
    total: Launch
    splits: int
    scalars: tuple[int, ...]


@remembered
def _sums(
    rows: int,
    columns: int,
    rank: int,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    strides: tuple[int, ...],
    tile: Tile,
) -> _Sums:
    size = rank * columns
    total = 2 * size + rank + columns
    splits, split_rows = row_splits(rows, columns, tile)
    constants = {"RANK": rank, "RANKS": padded_rank(rank), "BLOCK_M": tile.block_m, "BLOCK_H": tile.block_h}
    grid = (blocks(columns, tile.block_h), splits, 2)
    options = {"BLOCK": SUM_BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    return _Sums(
        Launch(adapter_weights_kernel, grid, constants | tile.options(), device),
        Launch(sum_splits_kernel, (blocks(total, SUM_BLOCK),), options, device),
        splits,
        (rows, split_rows, columns, size, *strides),
    )


def _weight_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    strides: tuple[int, ...],
    z: torch.Tensor,
    d_pre: torch.Tensor,
    rows: int,
    weights: AdapterWeights,
    *,
    narrow: bool,
) -> AdapterWeights:
    """Gradients in the weights' dtype; views of one buffer.

    Args:
        dy, x: rows, and ``strides`` from one to the next.
    """
    rank, columns = weights.down.shape
    size, dtype = rank * columns, weights.down.dtype
    total = 2 * size + rank + columns
    tile = (WEIGHT_TILES if narrow else WEIGHT_TILES_FP32)[padded_rank(rank)]
    sums = _sums(rows, columns, rank, (dy.dtype, x.dtype, dtype), z.device, strides, tile)
    flat = torch.empty(total, dtype=dtype, device=z.device)
    partial = torch.empty(sums.splits, total, dtype=torch.float32, device=z.device)
    sums.products((dy, x, z, d_pre, partial), sums.scalars)
    sums.total((partial, flat), (total, sums.splits))
    down, down_bias, up, up_bias = flat.split((size, rank, size, columns))
    return AdapterWeights(down.view(rank, columns), down_bias, up.view(columns, rank), up_bias)


@remembered
def _backward_launch(
    rows: int,
    columns: int,
    dtypes: tuple[torch.dtype | None, ...],
    device: torch.device,
    strides: tuple[int, ...],
    rank: int,
    tile: Tile,
    activation: int,
    dropout: bool,
    residual: bool,
    exact: tuple[int, int] | None,
    lane: bool,
    skip: bool,
    into: bool,
) -> Launch:
    constants = {"LANE": lane, "SKIP": skip, "RESIDUAL": residual} | lane_constants(exact, inverse=True)
    constants |= branch_constants(rank, columns, tile, activation, dropout=dropout)
    return Launch(adapter_backward_kernel, (blocks(rows, tile.block_m),), constants, device)


@without_gradients
def adapter_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: int,
    dropout: float,
    seed: int,
    skip: float,
    dx_into: torch.Tensor | None,
    stream: StreamTensors | None = None,
    remainder: torch.Tensor | None = None,
    residual: bool = False,
) -> tuple[torch.Tensor, AdapterWeights]:
    """``reference.adapter_backward``; with ``stream``, the inverse of its coupling step as well."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx_into is None else dx_into
    if not x.numel():
        return dx, AdapterWeights(*(torch.zeros_like(weight) for weight in weights))
    rank, columns = weights.down.shape
    rows = x.numel() // columns
    target = writable_rows(dx)
    (dy_rows, x_rows, dx_rows), (dy_stride, x_stride, dx_stride) = rows_of_all(dy.to(x.dtype), x, target)
    assert dy_rows is not None and x_rows is not None and dx_rows is not None
    # As bits from the start, if they are bfloat16: only kernels see them.
    dtype = torch.int16 if x.dtype == torch.bfloat16 else x.dtype
    z, d_pre = (torch.empty(rows, rank, dtype=dtype, device=x.device) for _ in range(2))
    into = None if dx_into is None else dx_rows
    lane = stream.lane if stream is not None else Coupling(1.0, None, None, None, None, False)
    streams, stream_strides = stream.rows() if stream is not None else ((None,) * 4, (0,) * 4)
    strides = (dy_stride, x_stride, dx_stride, dx_stride, *stream_strides)
    dtypes = (x.dtype, dx.dtype, *(() if stream is None else stream.dtypes))
    launch = _backward_launch(
        rows, columns, dtypes, x.device, strides, rank, tile_of(x, rank), activation, dropout > 0, residual,
        lane.exact, stream is not None, skip != 0, into is not None,
    )  # fmt: skip
    launch(
        (
            dy_rows, x_rows, *cast_weights(weights, x.dtype), into, dx_rows, z, d_pre, *streams, remainder,
            None if stream is None else stream.totals,
        ),
        (rows, columns, *strides, *dropout_scalars(dropout, seed), *lane_scalars(lane), float(skip)),
    )  # fmt: skip
    gradients = _weight_gradients(
        dy_rows, x_rows, (dy_stride, x_stride), z, d_pre, rows, weights, narrow=x.dtype != torch.float32
    )
    written(dx, target)
    return dx, gradients
