"""Slices of the hidden states by rows, for the parts of a layer that compute every row for itself."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

AUTO_ROWS = {"cpu": 512}
"""Rows of a tile by kind of device, where the settings leave it open; ``AUTO_ROWS_ELSEWHERE`` on all others."""

AUTO_ROWS_ELSEWHERE = 2048
"""A matrix product of so many rows still fills a large GPU: in tiles of 128 x 128, 2048 rows by 4096 columns are 512
blocks, near four for each of 132 multiprocessors, so that less than a tenth of them idle at the end."""

ALIGNMENT = 64
"""Tiles are multiples of so many rows, where they are longer: matrix products of other sizes waste part of a block."""


class Tile(NamedTuple):
    """Some rows of ``[batch, tokens, ...]`` or ``[rows, ...]`` that lie together in memory; all of them without slices.

    Several whole texts, or a part of one: what goes by the position in the text can be cut along.
    """

    texts: slice | None = None
    tokens: slice | None = None

    @property
    def is_whole(self) -> bool:
        return self.texts is None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tile's rows of a tensor of the hidden states' leading shape: a view."""
        if self.texts is None:
            return tensor
        return tensor[self.texts] if self.tokens is None else tensor[self.texts, self.tokens]

    def first_row(self, shape: torch.Size) -> int:
        """Number of its first row among all of hidden states of ``shape``."""
        if self.texts is None:
            return 0
        if self.tokens is None:
            return self.texts.start * math.prod(shape[1:-1])
        return self.texts.start * shape[1] + self.tokens.start

    def by_position(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same of ``[batch or 1, tokens, ...]``, which may stand for every text."""
        texts = self.texts if tensor.shape[0] > 1 else None
        return tensor[texts or slice(None), self.tokens or slice(None)]


WHOLE = [Tile()]
"""One tile that is everything."""


def auto_rows(device: torch.device) -> int:
    """Rows of a tile where none are given: as few as keep a matrix product efficient."""
    return AUTO_ROWS.get(device.type, AUTO_ROWS_ELSEWHERE)


def cut(shape: torch.Size, rows: int) -> list[Tile]:
    """Hidden states of ``shape`` in as few tiles of at most ``rows`` rows as there can be, of nearly equal size.

    A tile may have up to ``ALIGNMENT`` - 1 rows more than ``rows``, to be a multiple of that. Shapes that are neither
    ``[batch, tokens, H]`` nor ``[rows, H]`` stay whole.
    """
    if len(shape) not in (2, 3) or math.prod(shape[:-1]) <= rows:
        return WHOLE
    length = shape[-2]
    if len(shape) == 2:
        return [Tile(part) for part in _parts(length, rows)]
    if length <= rows:
        return [Tile(texts, slice(0, length)) for texts in _parts(shape[0], rows // length, alignment=1)]
    return [Tile(slice(text, text + 1), part) for text in range(shape[0]) for part in _parts(length, rows)]


def _parts(length: int, most: int, alignment: int = ALIGNMENT) -> list[slice]:
    count = -(-length // most)
    size = -(-length // count)
    if size > alignment:
        size = -(-size // alignment) * alignment
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def joined(parts: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Tiles put together again, with their graph; ``shape`` is the whole's but for its last dimension."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).view(*shape[:-1], parts[0].shape[-1])
