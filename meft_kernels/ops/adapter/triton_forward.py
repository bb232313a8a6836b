"""The adapter's fused forward kernels: the bottleneck never touches memory, nor does the branch of a coupling step.

Bytes per element of the hidden states in one launch, s = 2 (fp16, bf16) or 4 (fp32), k the remainder's bits:

    kernel             reads                                           writes
    adapter            x s, [residual s]                               out s
    couple, exact      stream 4, x s [twice with a residual], center 4 stream 4, value s, remainder k/8
    uncouple, exact    the same, remainder k/8                         stream 4, value s
    couple, float      stream t, x s, center t                         stream t, value s        (t = 2 or 4)

The weights, 2 r bytes a column in 16 bits, are read once a program and stay in L2. Work is 4 r flops an element: at
r = 64, bf16, exact, q = 1 and a value copy (12 B) 21 flops a byte, far from the 300 where an H100 stops being bound by
memory. What is above the floor: the second reading of x with a residual (from L2, mostly: the same program read it).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..coupling import reference as coupling
from ..coupling.packing import packed_shape, remainder_bits
from ..coupling.types import Coupled
from ..kernel_parts import (
    LANES,
    NATIVE,
    blocks,
    load_float,
    round_like,
    rows_of_all,
    writable_rows,
    written,
)
from ..launching import Launch, all_dense, remembered, without_gradients
from .dropout import drop_threshold, signed_seed
from .triton_parts import (
    COUNTS,
    EVEN_COLUMNS,
    Tile,
    add_totals,
    bottleneck_flags,
    branch_tile,
    couple_tile,
    element_tile,
    hidden,
    padded_rank,
    preactivation,
    row_tile,
    tile_for,
)
from .types import AdapterWeights, Coupling


@triton.jit(do_not_specialize=COUNTS)
def adapter_kernel(
    x, down, down_bias, up, up_bias, residual, out,
    rows: tl.int64, columns, x_stride, residual_stride, out_stride,
    seed: tl.int64, threshold: tl.int64, keep_scale,
    ACT: tl.constexpr, DROPOUT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``out = [residual +] adapter(x)``."""
    first, row, _exists = row_tile(rows, BLOCK_M)
    pre = preactivation(x, x_stride, down, down_bias, row, columns, RANK, RANKS, BLOCK_M, BLOCK_K, EVEN)
    z = hidden(pre, x, row, seed, threshold, keep_scale, ACT, DROPOUT, RANK, RANKS)
    for start in range(0, columns, BLOCK_H):
        line, column, mask, _group, _inside, _groups = element_tile(first, rows, start, columns, BLOCK_M, BLOCK_H, EVEN)
        values = branch_tile(z, x, x_stride, up, up_bias, line, column, mask, columns, start,
                             False, RANK, RANKS, BLOCK_M, BLOCK_H, EVEN)  # fmt: skip
        if residual is not None:
            values += load_float(residual, line[:, None] * residual_stride + column, mask)
        stored, _wide = round_like(values, out)
        tl.store(out + line[:, None] * out_stride + column, stored, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def adapter_couple_kernel(
    stream, x, down, down_bias, up, up_bias, center, out, value, packed, totals,
    rows: tl.int64, columns, stream_stride, x_stride, center_stride, out_stride, value_stride,
    seed: tl.int64, threshold: tl.int64, keep_scale, scale, inverse_scale, coefficient,
    EXACT: tl.constexpr, INVERSE: tl.constexpr, Q: tl.constexpr, SIGN: tl.constexpr, BITS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACT: tl.constexpr, DROPOUT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A coupling step, or its inverse, whose branch is ``adapter(x) [+ x]``."""
    first, row, exists = row_tile(rows, BLOCK_M)
    pre = preactivation(x, x_stride, down, down_bias, row, columns, RANK, RANKS, BLOCK_M, BLOCK_K, EVEN)
    z = hidden(pre, x, row, seed, threshold, keep_scale, ACT, DROPOUT, RANK, RANKS)
    sums = tl.zeros((BLOCK_M * BLOCK_H // LANES,), tl.int64)
    flags = tl.zeros((BLOCK_M * BLOCK_H // LANES,), tl.int32)
    flag = 0
    if not INVERSE:
        flag = bottleneck_flags(pre, exists, EXACT)
    for start in range(0, columns, BLOCK_H):
        line, column, mask, group, inside, groups = element_tile(first, rows, start, columns, BLOCK_M, BLOCK_H, EVEN)
        values = branch_tile(z, x, x_stride, up, up_bias, line, column, mask, columns, start,
                             RESIDUAL, RANK, RANKS, BLOCK_M, BLOCK_H, EVEN)  # fmt: skip
        more_sums, more_flags = couple_tile(
            values, stream, center, out, value, packed, line, column, mask, group, inside, groups,
            stream_stride, center_stride, out_stride, value_stride, scale, inverse_scale, coefficient,
            EXACT, INVERSE, Q, SIGN, BITS,
        )  # fmt: skip
        sums += more_sums
        flags = tl.maximum(flags, more_flags)
    add_totals(totals, sums, flags, flag, EXACT, INVERSE)


INTERPRETED: bool = not isinstance(adapter_couple_kernel, triton.runtime.JITFunction)
"""Whether Triton took these kernels for its interpreter (TRITON_INTERPRET), which runs them on CPU tensors."""


def cast_weights(weights: AdapterWeights, dtype: torch.dtype) -> AdapterWeights:
    """As the kernels read them: dense, in the dtype of the hidden states. Costs rank / rows of the product."""
    if weights.down.dtype == dtype and all_dense(*weights):
        return weights
    return AdapterWeights(*[weight.to(dtype).contiguous() for weight in weights])


def branch_constants(rank: int, columns: int, tile: Tile, activation: int, *, dropout: bool) -> dict[str, Any]:
    """Constexprs and options of a kernel that computes the branch."""
    constants = {
        "ACT": activation,
        "DROPOUT": dropout,
        "RANK": rank,
        "RANKS": padded_rank(rank),
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "BLOCK_H": tile.block_h,
        "EVEN": columns % EVEN_COLUMNS == 0,
    }
    return constants | tile.options()


def tile_of(x: torch.Tensor, rank: int) -> Tile:
    """The tile of every kernel that computes the branch of ``x``."""
    return tile_for(rank, x.shape[-1], narrow=x.dtype != torch.float32)


def dropout_scalars(dropout: float, seed: int) -> tuple[int, int, float]:
    """Seed, threshold and scale of the kept elements."""
    if not dropout:
        return 0, 0, 1.0
    return signed_seed(seed), drop_threshold(dropout), 1 / (1 - dropout)


def lane_constants(exact: tuple[int, int] | None, *, inverse: bool) -> dict[str, int]:
    """Constexprs of a coupling step."""
    q, sign = exact or (1, 1)
    return {"EXACT": exact is not None, "INVERSE": inverse, "Q": q, "SIGN": sign, "BITS": remainder_bits(q)}


def lane_scalars(lane: Coupling) -> tuple[float, float, float]:
    """(scale, inverse_scale, coefficient) of a coupling step."""
    k = lane.fraction_bits or 0
    return 2.0**k, 2.0**-k, float(lane.coefficient)


@remembered
def _adapter_launch(
    rows: int,
    columns: int,
    dtypes: tuple[torch.dtype | None, ...],
    device: torch.device,
    strides: tuple[int, ...],
    rank: int,
    tile: Tile,
    activation: int,
    dropout: bool,
) -> Launch:
    constants = branch_constants(rank, columns, tile, activation, dropout=dropout)
    return Launch(adapter_kernel, (blocks(rows, tile.block_m),), constants, device)


@without_gradients
def adapter(
    x: torch.Tensor, weights: AdapterWeights, activation: int, dropout: float, seed: int, residual: torch.Tensor | None
) -> torch.Tensor:
    """``reference.adapter``, not differentiable."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        tensors, strides = rows_of_all(x, residual, out)
        columns, rank = x.shape[-1], weights.down.shape[0]
        rows = out.numel() // columns
        dtypes = (x.dtype, None if residual is None else residual.dtype)
        launch = _adapter_launch(
            rows, columns, dtypes, x.device, strides, rank, tile_of(x, rank), activation, dropout > 0
        )
        launch(
            (tensors[0], *cast_weights(weights, x.dtype), *tensors[1:]),
            (rows, columns, *strides, *dropout_scalars(dropout, seed)),
        )
    return out


class StreamTensors:
    """The tensors of one coupling step as a kernel takes them; used by the forward and by the fused backward."""

    def __init__(self, stream: torch.Tensor, lane: Coupling) -> None:
        self.stream, self.lane = stream, lane
        native = lane.value_dtype in NATIVE
        self.value = torch.empty(stream.shape, dtype=lane.value_dtype, device=stream.device) if native else None
        self.out = stream if lane.inplace else torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
        self.totals = torch.zeros(2, dtype=torch.int64, device=stream.device)  # checksum and status
        self.source, self.target = stream, self.out
        if stream.numel() and lane.inplace:
            self.source = self.target = writable_rows(stream)

    def rows(self) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...]]:
        """Stream, center, out and value as rows, and their strides."""
        return rows_of_all(self.source, self.lane.center, self.target, self.value)

    @property
    def dtypes(self) -> tuple[torch.dtype | None, ...]:
        """Of the stream, the center and the value."""
        center, value = self.lane.center, self.value
        return self.stream.dtype, None if center is None else center.dtype, None if value is None else value.dtype

    @without_gradients
    def finish(self) -> None:
        """After the launch: what the kernel could not write itself."""
        lane, k = self.lane, self.lane.fraction_bits
        if self.stream.numel() and lane.inplace:
            written(self.stream, self.target)
        if self.value is None and lane.value_dtype is not None:  # float64, say
            out, dtype = self.out, lane.value_dtype
            self.value = out.contiguous().to(dtype) if k is None else coupling.dequantise(out, k, dtype)

    @property
    def checksum(self) -> torch.Tensor:
        """int64 scalar."""
        return self.totals[0]

    @property
    def status(self) -> torch.Tensor:
        """int32 scalar; little-endian, as packing insists."""
        return self.totals.view(torch.int32)[2]


@remembered
def _couple_launch(
    inverse: bool,
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
) -> Launch:
    constants = lane_constants(exact, inverse=inverse) | {"RESIDUAL": residual}
    constants |= branch_constants(rank, columns, tile, activation, dropout=dropout)
    return Launch(adapter_couple_kernel, (blocks(rows, tile.block_m),), constants, device)


@without_gradients
def couple(
    inverse: bool,
    stream: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: int,
    dropout: float,
    seed: int,
    residual: bool,
    remainder: torch.Tensor | None,
    lane: Coupling,
) -> StreamTensors:
    """One coupling step or its inverse, ``remainder`` being written or read."""
    tensors = StreamTensors(stream, lane)
    if stream.numel():
        (source, center, target, value), (stream_stride, *others) = tensors.rows()
        (x_rows,), (x_stride,) = rows_of_all(x)
        columns, rank = x.shape[-1], weights.down.shape[0]
        rows = stream.numel() // columns
        strides = (stream_stride, x_stride, *others)
        launch = _couple_launch(
            inverse, rows, columns, (x.dtype, *tensors.dtypes), x.device, strides, rank, tile_of(x, rank), activation,
            dropout > 0, residual, lane.exact,
        )  # fmt: skip
        launch(
            (source, x_rows, *cast_weights(weights, x.dtype), center, target, value, remainder, tensors.totals),
            (rows, columns, *strides, *dropout_scalars(dropout, seed), *lane_scalars(lane)),
        )
    tensors.finish()
    return tensors


def adapter_couple(
    a: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: int,
    dropout: float,
    seed: int,
    residual: bool,
    lane: Coupling,
) -> Coupled:
    """``reference.adapter_couple``."""
    packed = None
    if lane.exact is not None and lane.exact[0] > 1:
        packed = torch.empty(packed_shape(a.shape, lane.exact[0]), dtype=torch.uint8, device=a.device)
    done = couple(False, a, x, weights, activation, dropout, seed, residual, packed, lane)
    return Coupled(done.out, done.value, packed, done.checksum, done.status)
