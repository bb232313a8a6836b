"""One call of a layer: what both of its lanes share, in forward and again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..adapters import FusedBranch
from ..errors import ReversibleUsageError
from ..modules import parameters_of
from .extras import Extras
from .pieces import AttentionInPieces, Seeds
from .replay import no_leaf, seeded
from .tape import Tape
from .tiles import Tile
from .variants import Branch, Plan

Gradients = list[torch.Tensor | None]


class Layer(Protocol):
    """What the engine needs of a patched layer."""

    index: int
    name: str
    module: nn.Module

    @property
    def plan(self) -> Plan:
        """The layer's two lanes."""

    def with_adapters(self) -> AbstractContextManager[None]:
        """For a block, adapters are in force, also where this thread leaves them out of new passes."""

    def has(self, branch: Branch) -> bool:
        """Whether the branch computes anything (a bare adapter may have been left out)."""

    def fused(self, branch: Branch, hidden_states: torch.Tensor) -> FusedBranch | None:
        """The branch for a kernel that couples as well; None where torch must compute it."""

    def run(
        self, branch: Branch, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """One branch of the layer, and what else the layer returns if this branch makes it."""

    def tiles(self, branch: Branch, hidden_states: torch.Tensor) -> list[Tile]:
        """The rows at a time for which :meth:`rows` is to be called; one tile where :meth:`run` is."""

    def check_blocks(self, hidden_states: torch.Tensor, kwargs: dict[str, Any], seed: int | None) -> None:
        """Hold the family's blocks against the layer, before :meth:`mix` and :meth:`rows` stand in for it."""

    def mixes(self, branch: Branch) -> bool:
        """Whether the branch begins with a part that no tile can compute for itself."""

    def mix(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """That part, of all rows: the layer up to the end of its attention block."""

    def rows(self, branch: Branch, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The rest of the branch, of some rows."""

    def pieces(self, branch: Branch, kwargs: dict[str, Any], seeds: Seeds) -> AttentionInPieces | None:
        """:meth:`mix` in pieces, where that is wanted and the layer's family says how."""


@dataclass
class Call:
    """One call of a layer in one forward pass.

    Attributes:
        layer: whose call.
        tape: of the pass.
        kwargs: the call's arguments beside the hidden states, by name.
        inputs: tensors besides the streams that need a gradient: parameters, and leaves that stand in ``kwargs`` for
            the arguments that need one.
        extras: what the layer returned beside its hidden states.
    """

    layer: Layer
    tape: Tape
    kwargs: dict[str, Any]
    inputs: list[torch.Tensor]
    extras: Extras = field(default_factory=Extras)

    def watched(self, function: Callable[[torch.Tensor], Any], x: torch.Tensor, seed: int | None, where: str) -> Any:
        """``function(x)`` under random numbers of its own.

        Raises:
            ReversibleUsageError: it wrote into ``x``, which others read.
        """
        version = None if x.is_inference() else x._version
        with seeded(seed, x.device):
            made = function(x)
        if version is not None and x._version != version:
            raise ReversibleUsageError(f"{where} wrote into its own input, which others read: let it work on a copy")
        return made

    @contextmanager
    def again(self) -> Iterator[None]:
        """A recompute's surroundings: adapters and autocast as in forward, and gradients recorded.

        Not for the backward through it, whose products autocast would round.
        """
        with self.layer.with_adapters(), self.tape.autocast.restored(), torch.enable_grad():
            yield

    def differentiate(
        self,
        edges: Sequence[GradientEdge | None],
        incoming: Sequence[torch.Tensor],
        leaves: Sequence[torch.Tensor],
        gradients: Gradients,
    ) -> list[torch.Tensor | None]:
        """Send ``incoming`` down a recompute's graph; adds what reaches ``inputs`` to ``gradients``.

        Returns:
            The gradients of ``leaves``; None for those that nothing reaches.
        """
        roots = [(edge, gradient) for edge, gradient in zip(edges, incoming, strict=True) if edge is not None]
        if not roots or not (leaves or self.inputs):
            return [None] * len(leaves)
        found = torch.autograd.grad(
            [edge for edge, _ in roots], [*leaves, *self.inputs], [gradient for _, gradient in roots], allow_unused=True
        )
        self.collect(zip(self.inputs, found[len(leaves) :], strict=True), gradients)
        return list(found[: len(leaves)])

    def collect(self, found: Iterable[tuple[torch.Tensor, torch.Tensor | None]], gradients: Gradients) -> None:
        """Add gradients, each with its tensor, to those of ``inputs``."""
        places = {id(tensor): place for place, tensor in enumerate(self.inputs)}
        for tensor, gradient in found:
            place = places.get(id(tensor))
            if place is None or gradient is None:
                continue
            held = gradients[place]
            gradients[place] = gradient if held is None else held + gradient

    def check_parameters(self) -> None:
        """The recompute must reach the parameters that forward recorded, or they would silently get no gradient."""
        present = {id(parameter) for parameter in parameters_of(self.layer.module)}
        for parameter in self.inputs:
            if isinstance(parameter, nn.Parameter) and not (id(parameter) in present and parameter.requires_grad):
                raise ReversibleUsageError(
                    f"trainable parameters of {self.layer.name} were replaced or frozen between forward and backward "
                    "(unpatch, another adapter switched on or off, a module swapped, functional_call): "
                    "run backward first"
                )


def leaf_of(tensor: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """The tensor's values, to differentiate by."""
    return tensor.detach().requires_grad_(wanted)


def entering(tensor: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """The same as an input that nobody differentiates by, as a forward records it."""
    return no_leaf(leaf_of(tensor, wanted))


def edge_of(output: torch.Tensor) -> GradientEdge | None:
    """Where a gradient enters the output's graph: it holds the graph and not the tensor. None where none flows."""
    return get_gradient_edge(output) if output.requires_grad else None
