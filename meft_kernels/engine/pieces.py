"""A layer's attention in three pieces: projections and output tile by tile, attention itself by groups of heads.

Whole, its recompute keeps what the projections and their norm leave behind for every row until its backward has run.
In pieces only queries, keys and values stand whole; the projections are computed once more for their own backward, and
the gradients of queries, keys and values are written over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from ..architectures import AttentionPieces
from ..memory import shortened
from .graph import gradients_of
from .replay import seeded
from .tiles import Tile, joined

MAX_GROUPS = 8

LEAST_ROWS_OF_HEADS = 2**16
"""Heads times tokens of a group: fewer leave part of a GPU idle (blocks of 128 rows, four for each of 132
multiprocessors), so that short texts have fewer groups."""

PROJECT, ATTEND = 2, 3
"""Kinds of parts that draw random numbers; see ``LaneBranch.seed``."""


class Seeds(Protocol):
    """The seed of a part of a lane."""

    def __call__(self, kind: int, number: int) -> int | None: ...


def why_whole(family: AttentionPieces, layer: Any, kwargs: dict[str, Any]) -> str | None:
    """What would be lost if this call's attention ran in pieces, or None."""
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    for module in family.replaces(layer):
        name = type(module).__name__
        if "forward" in vars(module) or not type(module).forward.__module__.startswith("transformers."):
            return f"the forward of {name} was replaced"
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            return f"hooks are registered on {name}"
    return None


class AttentionInPieces:
    """The pieces of one layer's call."""

    def __init__(self, family: AttentionPieces, module: Any, kwargs: dict[str, Any], seeds: Seeds) -> None:
        self.family, self.module, self.kwargs, self.seeds = family, module, kwargs, seeds

    def _at(self, tile: Tile) -> dict[str, Any]:
        """The call's arguments for some rows."""
        cut = {
            name: tree_map_only(torch.Tensor, tile.by_position, self.kwargs[name])
            for name in self.family.by_position
            if self.kwargs.get(name) is not None
        }
        return {**self.kwargs, **cut}

    def project(self, number: int, tile: Tile, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a tile, each ``[texts, heads, tokens, D]``."""
        with seeded(self.seeds(PROJECT, number), x.device):
            return self.family.project(self.module, x, **self._at(tile))

    def output(self, tile: Tile, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Hidden states after the attention block, of a tile."""
        return self.family.output(self.module, x, attended, **self._at(tile))

    def core(self, number: int, parts: list[torch.Tensor]) -> torch.Tensor:
        """Attention of a group of heads, ``[batch, tokens, heads, D]``."""
        with seeded(self.seeds(ATTEND, number), parts[0].device):
            return self.family.attend(self.module, *parts, **self.kwargs)

    def groups_of(self, qkv: list[torch.Tensor]) -> int:
        """How many groups of heads attention runs in."""
        masks = [v for v in self.kwargs.values() if isinstance(v, torch.Tensor) and v.dim() == 4 and v.shape[1] > 1]
        if masks:
            return 1  # a mask for every head
        batch, heads, tokens, _ = qkv[0].shape
        shared = math.gcd(*(part.shape[1] for part in qkv))
        most = min(MAX_GROUPS, max(1, batch * heads * tokens // LEAST_ROWS_OF_HEADS))
        return max(groups for groups in range(1, most + 1) if shared % groups == 0)

    def attend(
        self,
        tiles: list[Tile],
        enter: Callable[[Tile], torch.Tensor],
        *,
        recording: bool,
        keeping: bool = False,
        note: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None] | None = None,
    ) -> Attended:
        """Attention over all rows, which ``enter`` gives tile by tile as inputs of a graph.

        Args:
            recording: whether to run with gradients recorded.
            keeping: whether attention's own graph is kept for :meth:`Attended.backward`.
            note: sees what each piece gives, and from what.
        """
        qkv: list[torch.Tensor] = []
        for number, tile in shortened(list(enumerate(tiles))):
            with torch.set_grad_enabled(recording or torch.is_grad_enabled()):
                x = enter(tile)
                made = self.project(number, tile, x)
            if note is not None:
                note(made, [x])
            if not qkv:
                batch, tokens = _shape(tiles)
                qkv = [
                    part.new_empty(batch, tokens, part.shape[1], part.shape[3]).transpose(1, 2).detach()
                    for part in made
                ]
            for part, whole in zip(made, qkv, strict=True):
                whole[tile.texts, :, tile.tokens].copy_(part.detach())
            del made, x, part
        attended = Attended(qkv)
        groups = self.groups_of(qkv)
        for group in range(groups):
            parts = [_heads(part, group, groups).detach().requires_grad_(recording) for part in qkv]
            with torch.set_grad_enabled(recording or torch.is_grad_enabled()):
                out = self.core(group, parts)
            if note is not None:
                note([out], parts)
            attended.add(out, parts if keeping else None)
            del out, parts
        if not keeping:
            attended.qkv = []
        return attended

    def attend_with_graph(self, tiles: list[Tile], hidden_states: torch.Tensor) -> Attended:
        """The same numbers under plain autograd."""
        parts = [self.project(number, tile, tile.of(hidden_states)) for number, tile in enumerate(tiles)]
        qkv = [
            joined([part.transpose(1, 2).flatten(2) for part in of_a_kind], hidden_states.shape)
            .unflatten(-1, (-1, of_a_kind[0].shape[-1]))
            .transpose(1, 2)
            for of_a_kind in zip(*parts, strict=True)
        ]
        groups = self.groups_of(qkv)
        attended = Attended([])
        attended.outputs = [self.core(group, [_heads(part, group, groups) for part in qkv]) for group in range(groups)]
        return attended


class Attended:
    """What attention gave, by groups of heads, and the way back through it."""

    def __init__(self, qkv: list[torch.Tensor]) -> None:
        self.qkv = qkv
        self.outputs: list[torch.Tensor] = []
        self._graphs: list[tuple[GradientEdge, list[torch.Tensor]]] = []
        self._gradients: list[torch.Tensor] = []

    def add(self, out: torch.Tensor, parts: list[torch.Tensor] | None) -> None:
        """Take up one more group; its graph too, where its inputs are given."""
        if parts is not None:
            self._graphs.append((get_gradient_edge(out), parts))
            # A copy that attention's graph does not hold: what it gave in another order of memory. Gradients are
            # written over it, tile by tile as it has been read; anywhere else they need memory of their own.
            is_copy = type(out.grad_fn).__name__ == "CloneBackward0"
            self._gradients.append(out.detach() if is_copy else torch.zeros_like(out))
        self.outputs.append(out.detach())

    def of(self, tile: Tile) -> torch.Tensor:
        """All heads of some rows, ``[texts, tokens, heads, D]``."""
        return torch.cat([tile.of(out) for out in self.outputs], dim=2)

    def write_gradient(self, tile: Tile, gradient: torch.Tensor | None) -> None:
        """Take up the gradient of :meth:`of`, which is not to be called for the tile again."""
        heads = [out.shape[2] for out in self.outputs]
        parts = [None] * len(heads) if gradient is None else gradient.split(heads, dim=2)
        for whole, part in zip(self._gradients, parts, strict=True):
            tile.of(whole).zero_() if part is None else tile.of(whole).copy_(part)

    def backward(self) -> None:
        """Turn the gradients of what attention gave into those of queries, keys and values, written over them."""
        self.outputs = []
        while self._graphs:
            edge, parts = self._graphs.pop()
            found = gradients_of([edge], parts, [self._gradients.pop()])
            del edge
            for part, gradient in zip(parts, found, strict=True):
                # By .data: the other groups' heads, which the same version counter stands for, are not touched.
                part.data.zero_() if gradient is None else part.data.copy_(gradient)
            del parts, found, part, gradient

    def gradients_of(self, tile: Tile) -> list[torch.Tensor]:
        """Gradients of a tile's queries, keys and values; after :meth:`backward`."""
        return [part[tile.texts, :, tile.tokens] for part in self.qkv]


def _heads(tensor: torch.Tensor, group: int, groups: int) -> torch.Tensor:
    size = tensor.shape[1] // groups
    return tensor[:, group * size : (group + 1) * size]


def _shape(tiles: list[Tile]) -> tuple[int, int]:
    """Texts and tokens of all tiles together."""
    last = tiles[-1]
    assert last.texts is not None and last.tokens is not None, "only hidden states [batch, tokens, H] come in pieces"
    return last.texts.stop, last.tokens.stop
