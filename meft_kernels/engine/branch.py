"""A lane's branch in one call of a layer: in one go or in parts, each under random numbers of its own."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .adapters import FusedBranch
from .call import Call
from .pieces import AttentionInPieces
from .replay import first_drawn
from .tiles import WHOLE
from .variants import Lane

_WHOLE, _ROWS = 0, 1
"""Kinds of parts of a lane, each of which draws random numbers of its own; ``pieces`` has two more."""


class LaneBranch:
    """See above. ``tiles`` are the rows that are computed at a time, decided in forward."""

    def __init__(self, call: Call, lane: Lane) -> None:
        self.call = call
        self.lane = lane
        self.tiles = WHOLE

    @property
    def is_identity(self) -> bool:
        """Whether the lane only hands its stream on: no adapter in it, and coefficient 1."""
        return not self.call.layer.has(self.lane.branch) and self.lane.coefficient == 1

    @property
    def reads_by_tile(self) -> bool:
        """Whether the recompute makes what it needs of the center's value tile by tile, after a forward."""
        return len(self.tiles) > 1 and self.pieces is not None

    @functools.cached_property
    def where(self) -> str:
        return f"{self.lane.name} ({self.lane.branch.replace('_', ' ')}) of {self.call.layer.name}"

    def seed(self, kind: int = _WHOLE, number: int = 0) -> int | None:
        """Of a part of the branch. Layers and lanes lie closer together than parts do: 2^40 apart, 2^22 of them."""
        base = self.call.tape.seed
        if base is None:
            return None
        return base + 2 * self.call.place + (self.lane.name == "G") + (kind << 60) + (number << 40)

    def whole(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        call = self.call
        return call.watched(lambda x: call.layer.run(self.lane.branch, x, call.kwargs), x, self.seed(), self.where)

    def mixed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """What the tiles start from, and what else the layer returns."""
        call = self.call
        if not call.layer.mixes(self.lane.branch):
            return x, None
        return call.watched(lambda x: call.layer.mix(x, call.kwargs), x, self.seed(), self.where)

    def rows(
        self,
        number: int,
        x: torch.Tensor,
        pieces: AttentionInPieces | None = None,
        attended: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rest of the branch, of one tile; with attention in pieces, from what attention gave."""
        call = self.call

        def rows(x: torch.Tensor) -> torch.Tensor:
            if pieces is not None and attended is not None:
                x = pieces.output(self.tiles[number], x, attended)
            return call.layer.rows(self.lane.branch, x, call.kwargs)

        return call.watched(rows, x, self.seed(_ROWS, number), self.where)

    def fused(self, hidden_states: torch.Tensor) -> FusedBranch | None:
        """The branch for a kernel that couples as well, with the random numbers that ``whole`` would draw."""
        arithmetic = self.call.tape.arithmetic
        branch = self.call.layer.fused(self.lane.branch, hidden_states) if arithmetic.fuses else None
        if branch is not None and branch.dropout:
            branch = branch._replace(seed=first_drawn(self.seed()))
        return branch

    @functools.cached_property
    def pieces(self) -> AttentionInPieces | None:
        """Attention in pieces, if that is how it is to run; decided in forward, for the recompute as well."""
        return self.call.layer.pieces(self.lane.branch, self.call.kwargs, self.seed)
