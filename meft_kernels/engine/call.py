"""One call of a layer: what both of its lanes share, in forward and again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import ReversibleUsageError
from .adapters import FusedBranch
from .extras import Extras
from .graph import gradients_of, guarded_leaf_of, reached_by
from .pieces import AttentionInPieces, Seeds
from .replay import no_leaf, seeded
from .surroundings import Surroundings, version_of
from .tape import Tape
from .tiles import Tile
from .variants import Branch, Plan

Gradients = list[torch.Tensor | None]


class Layer(Protocol):
    """What the engine needs of a patched layer."""

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
        place: of the call among those of its stack; the layer's index, where each is called once.
        kwargs: the call's arguments beside the hidden states, by name.
        found: what the call found in its module; None where no gradients are recorded, or autograd itself does it.
        inputs: tensors besides the streams that need a gradient: parameters, and leaves that stand in ``kwargs`` for
            the arguments that need one.
        reached: places in ``inputs`` of those that forward was seen to take part in.
        extras: what the layer returned beside its hidden states.
    """

    layer: Layer
    tape: Tape
    place: int
    kwargs: dict[str, Any]
    found: Surroundings | None = None
    inputs: list[torch.Tensor] = field(init=False)
    reached: set[int] = field(default_factory=set)
    extras: Extras = field(default_factory=Extras)

    def __post_init__(self) -> None:
        self.inputs = [] if self.found is None else self.found.leaves
        self._places = dict(zip(map(id, self.inputs), range(len(self.inputs)), strict=True))

    def forget(self) -> None:
        """Let go of what backward has used."""
        self.kwargs, self.found, self.inputs, self._places = {}, None, [], {}

    def watched(self, function: Callable[[torch.Tensor], Any], x: torch.Tensor, seed: int | None, where: str) -> Any:
        """``function(x)`` under random numbers of its own.

        Raises:
            ReversibleUsageError: it wrote into ``x``, which others read.
        """
        version = version_of(x)
        with seeded(seed, x.device):
            made = function(x)
        if version_of(x) != version:
            raise ReversibleUsageError(f"{where} wrote into its own input, which others read: let it work on a copy")
        return made

    def entering(self, tensor: torch.Tensor, recording: bool) -> torch.Tensor:
        """The tensor's values as the input of a branch in forward, whose graph is dropped."""
        if not recording:
            return tensor.detach()
        return no_leaf(guarded_leaf_of(tensor, self.layer.name))

    def note(self, outputs: Sequence[Any], entered: Sequence[torch.Tensor]) -> None:
        """Take note of which ``inputs`` take part in what a branch made of ``entered``.

        Raises:
            ReversibleUsageError: something else does that needs a gradient.
        """
        if self.found is None:
            if any(isinstance(output, torch.Tensor) and output.requires_grad for output in outputs):
                self._refuse_foreign(None)
            return
        computed = self.found.computed()
        begun = {x.grad_fn for x in entered if x.grad_fn is not None}
        made = [output for output in outputs if isinstance(output, torch.Tensor)]
        for node in reached_by(made, begun | computed.keys()):
            leaf = computed[node] if node in computed else getattr(node, "variable", None)
            place = self._places.get(id(leaf))
            if place is not None:
                self.reached.add(place)
            elif node not in begun and not any(leaf is x for x in entered):
                self._refuse_foreign(leaf)

    def _refuse_foreign(self, leaf: torch.Tensor | None) -> None:
        what = "a tensor" if leaf is None else f"a tensor of shape {tuple(leaf.shape)}"
        raise ReversibleUsageError(
            f"{what} that needs a gradient takes part in {self.layer.name}, of which it is neither a parameter nor an "
            "argument (a hook or an object among the arguments holds it, or another layer): a reversible layer would "
            "give it none. Register it in the layer, detach() it, or patch(model, engine='autograd')."
        )

    def check_reached(self, gradients: Gradients) -> None:
        """Raise if something that took part in forward did not in the recompute: it would get no gradient."""
        for place in self.reached:
            if gradients[place] is None and self.found is not None:
                raise ReversibleUsageError(
                    f"{self.found.name_of(self.inputs[place])} of {self.layer.name} took part in forward and not in "
                    "its recompute, so it has no gradient: an adapter was merged, switched or disabled between forward "
                    "and backward. Run backward first; drop the gradients of this step (optimizer.zero_grad())."
                )

    @contextmanager
    def again(self) -> Iterator[None]:
        """What a recompute runs under: adapters and autocast as in forward, and gradients recorded.

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
        found = gradients_of([edge for edge, _ in roots], [*leaves, *self.inputs], [gradient for _, gradient in roots])
        for place, gradient in enumerate(found[len(leaves) :]):
            if gradient is not None:
                self._add(place, gradient, gradients)
        return list(found[: len(leaves)])

    def collect(self, found: Iterable[tuple[torch.Tensor, torch.Tensor | None]], gradients: Gradients) -> None:
        """Add gradients, each with its tensor, to those of ``inputs``."""
        for tensor, gradient in found:
            place = self._places.get(id(tensor))
            if place is not None and gradient is not None:
                self._add(place, gradient, gradients)

    @staticmethod
    def _add(place: int, gradient: torch.Tensor, gradients: Gradients) -> None:
        held = gradients[place]
        gradients[place] = gradient if held is None else held + gradient


def edge_of(output: torch.Tensor) -> GradientEdge | None:
    """Where a gradient enters the output's graph: it holds the graph and not the tensor. None where none flows."""
    return get_gradient_edge(output) if output.requires_grad else None
