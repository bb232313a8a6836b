"""What a layer returns beside its hidden states: attention weights, or the position biases that T5's layers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten


@dataclass
class Extras:
    """The extras of one layer call, cut from the graph that made them, and which of them need a gradient."""

    leaves: list[Any] = field(default_factory=list)
    tree: TreeSpec | None = None
    places: list[int] = field(default_factory=list)
    """Indices of the leaves that need a gradient."""

    @classmethod
    def of(cls, values: tuple[Any, ...]) -> Extras:
        """Detached from their graph, which would keep the layer's activations."""
        leaves, tree = tree_flatten(values)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        detached = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return cls(detached, tree, places)

    def differentiable(self) -> list[torch.Tensor]:
        """Those that need a gradient: further outputs of the layer's Function."""
        return [self.leaves[place] for place in self.places]

    def take(self, outputs: Sequence[torch.Tensor] = ()) -> tuple[Any, ...] | None:
        """All of them as the layer returned them, ``outputs`` in the places of :meth:`differentiable`.

        None if it returned hidden states bare. They are handed over and not kept: this object lives until backward.
        """
        if self.tree is None:
            return None
        leaves, self.leaves = self.leaves, []
        for place, output in zip(self.places, outputs, strict=bool(outputs)):
            leaves[place] = output
        values: tuple[Any, ...] = tree_unflatten(leaves, self.tree)
        return values

    def again(self, values: tuple[Any, ...]) -> Iterable[torch.Tensor]:
        """The same ones as :meth:`differentiable` in a recompute's extras."""
        leaves = tree_leaves(values)
        return [leaves[place] for place in self.places]
