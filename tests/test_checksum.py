"""The checksum tells streams apart that hold the same numbers at other places, and parts of it add up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import meft_kernels
from meft_kernels import NotRepeatableError, ops
from meft_kernels.engine.tiles import cut

from .models import TRAINABLE_START, VARIANTS, tiny_batch, tiny_bert, tiny_llama

ROWS, WIDTH = 24, 40


def naive_weight(place: int) -> int:
    hashed = (place * 0x9E3779B1 + 2**31) % 2**32 - 2**31
    return (hashed ^ (hashed >> 15)) | 1


def naive_checksum(stream: torch.Tensor, first_row: int = 0) -> int:
    """In Python's own integers, as a signed 64-bit number."""
    lines = stream.reshape(-1, stream.shape[-1]).tolist() if stream.numel() else []
    total = sum(
        value * naive_weight(~(first_row + row)) * naive_weight(column)
        for row, line in enumerate(lines)
        for column, value in enumerate(line)
    )
    return (total + 2**63) % 2**64 - 2**63


def normed(bits: int = 22) -> torch.Tensor:
    """What a norm leaves: rows of sum 0 and length 1, but for rounding, whose plain sums are all alike."""
    torch.manual_seed(0)
    values = torch.nn.functional.layer_norm(torch.randn(ROWS, WIDTH, dtype=torch.float64), (WIDTH,))
    return (values * 2**bits).round().to(torch.int32)


@pytest.mark.parametrize("shape", [(63, 100), (7,), (2, 3, 16), (3, 1), (1, 13), (0,), (0, 7), (3, 0), (2100, 33)])
@pytest.mark.parametrize("first_row", [0, 5, 2**30])
def test_against_pythons_integers(shape: tuple[int, ...], first_row: int) -> None:
    torch.manual_seed(0)
    stream = torch.randint(-(2**30) + 1, 2**30, shape, dtype=torch.int32)
    found = ops.checksum(stream, first_row)
    assert (found.dtype, found.shape) == (torch.int64, ())
    assert found.item() == naive_checksum(stream, first_row)


def test_any_strides() -> None:
    stream = torch.randint(-(2**20), 2**20, (6, 5, 12), dtype=torch.int32)
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        lying = stream.permute(order)
        assert torch.equal(ops.checksum(lying), ops.checksum(lying.contiguous()))
    assert torch.equal(ops.checksum(stream[..., ::2]), ops.checksum(stream[..., ::2].clone()))


def _swapped(stream: torch.Tensor, places: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    stream = stream.clone()
    stream[places], stream[others] = stream[others].clone(), stream[places].clone()
    return stream


def _mixed_up(stream: torch.Tensor) -> torch.Tensor:
    """Two pairs of rows averaged, as mixup does: columns and the whole keep their sums."""
    stream = stream.clone()
    half = (stream[0] - stream[1]) // 4
    stream[0] -= half
    stream[1] += half
    return stream


def _around_a_rectangle(stream: torch.Tensor) -> torch.Tensor:
    """Sums of rows and of columns stay as they are."""
    stream = stream.clone()
    stream[2, 3] += 1 << 14
    stream[2, 9] -= 1 << 14
    stream[7, 3] -= 1 << 14
    stream[7, 9] += 1 << 14
    return stream


def _transposed_block(stream: torch.Tensor) -> torch.Tensor:
    stream = stream.clone()
    stream[:ROWS, :ROWS] = stream[:ROWS, :ROWS].T.clone()
    return stream


@pytest.mark.parametrize("bits", [22, 4], ids=["fine", "coarse"])
@pytest.mark.parametrize(
    "change",
    [
        lambda stream: stream.flip(0),
        lambda stream: stream.flip(1),
        lambda stream: stream.roll(1, 0),
        lambda stream: stream.roll(1, 1),
        lambda stream: _swapped(stream, torch.arange(8), torch.arange(8, 16)),
        _mixed_up,
        _around_a_rectangle,
        _transposed_block,
        lambda stream: stream.flatten().flip(0).view_as(stream),
    ],
    ids=["rows", "columns", "next row", "next column", "tiles", "mixup", "rectangle", "transposed", "backwards"],
)
def test_same_numbers_at_other_places_show(change: Callable[[torch.Tensor], torch.Tensor], bits: int) -> None:
    stream = normed(bits)
    assert not torch.equal(ops.checksum(change(stream)), ops.checksum(stream))


def test_any_two_rows_or_columns_that_change_places_show() -> None:
    """Rows of a norm have one sum: weights for rows alone would not tell them apart."""
    for stream in (normed(), normed().T.contiguous()):
        sums = set()
        rows = stream.shape[0]
        for one in range(rows):
            for other in range(one + 1, rows):
                order = torch.arange(rows)
                order[one], order[other] = other, one
                sums.add(ops.checksum(stream[order]).item())
        assert len(sums) == math.comb(rows, 2)
        assert ops.checksum(stream).item() not in sums


@pytest.mark.parametrize("shape", [(10, 9, 16), (3, 200, 16), (150, 16)])
@pytest.mark.parametrize("rows", [1, 20, 64])
def test_tiles_add_up(shape: tuple[int, ...], rows: int) -> None:
    stream = torch.randint(-(2**30), 2**30, shape, dtype=torch.int32)
    tiles = cut(stream.shape, rows)
    assert len(tiles) > 1
    parts = [ops.checksum(tile.of(stream), tile.first_row(stream.shape)) for tile in tiles]
    assert torch.equal(torch.stack(parts).sum(), ops.checksum(stream))
    branch, center = torch.randn(shape), torch.randint(-(2**20), 2**20, shape, dtype=torch.int32)
    options = {"fraction_bits": 16, "impl": "torch"}
    whole = ops.couple(stream // 4, branch, -1 / 8, center=center, **options)
    there, back = [], []
    for tile in tiles:
        some = {"center": tile.of(center), "first_row": tile.first_row(stream.shape), **options}
        done = ops.couple(tile.of(stream // 4), tile.of(branch), -1 / 8, **some)
        undone = ops.uncouple(done.y, tile.of(branch), -1 / 8, done.remainder, **some)
        there.append(done.checksum)
        back.append(undone.checksum)
    assert torch.equal(torch.stack(there).sum(), whole.checksum)
    assert torch.equal(torch.stack(back).sum(), ops.checksum(stream // 4))


class Shuffling(torch.nn.Module):
    """Hands tokens on in an order that torch's generators do not decide."""

    def __init__(self, inner: torch.nn.Module, orders: list[list[int]]) -> None:
        super().__init__()
        self.inner, self.orders = inner, orders

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[:, self.orders.pop(0)]


@pytest.mark.parametrize("settings", [{}, {"tile": 4}], ids=["whole", "tiles"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_in_another_order_are_told(family: str, variant: str, settings: dict[str, int]) -> None:
    """In the lowest layer, whose rebuilt input nothing below has to meet."""
    model = tiny_llama() if family == "llama" else tiny_bert()
    lam, beta = (-1 / 8, 1.0) if variant == "meft1" else (1.0, -1 / 8) if variant == "meft2" else (-1 / 8, -1 / 8)
    meft_kernels.patch(model, variant=variant, lam=lam, beta=beta, fraction_bits=20, **TRAINABLE_START, **settings)
    model.train()
    batch = tiny_batch(model, rows=1, tokens=4)
    orders = [[0, 1, 2, 3], [1, 0, 3, 2]]
    if family == "llama":
        layer = model.model.layers[0]
        layer.mlp.down_proj = Shuffling(layer.mlp.down_proj, orders)
    else:
        layer = model.bert.encoder.layer[0]
        layer.output.dense = Shuffling(layer.output.dense, orders)
    loss = model(**batch).loss
    with pytest.raises(NotRepeatableError, match=r"layers?\.0"):
        loss.backward()
