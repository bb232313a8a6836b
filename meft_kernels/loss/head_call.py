"""One call of a head that was put off: what it was given, what was done with its output since, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..engine.graph import gradients_of
from ..engine.replay import AutocastState
from ..errors import ReversibleUsageError
from ..modules import parameters_of

Operation = Callable[[torch.Tensor], torch.Tensor]
"""Something done to logits element by element: any rows of the result are that of the same rows."""


def version_of(tensor: torch.Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count it."""
    return -1 if tensor.is_inference() else tensor._version


def refuse_second_order() -> None:
    """Called in backward: gradients made in forward have no graph of their own.

    Raises:
        ReversibleUsageError: one is asked for.
    """
    if torch.is_grad_enabled():
        raise ReversibleUsageError(
            'the loss in chunks has first derivatives only, and create_graph=True asks for more: take loss="full"'
        )


def leaves_behind(output: torch.Tensor) -> list[torch.Tensor]:
    """Every tensor that a gradient of ``output`` would end in, also those that no module holds (PEFT ties some so)."""
    found: dict[int, torch.Tensor] = {}
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found[id(variable)] = variable
        todo += [following for following, _ in node.next_functions]
    return list(found.values())


@dataclass(frozen=True)
class Head:
    """A head as it was when it was called.

    Attributes:
        module: that was called.
        forward: its forward, as it would be without us.
        autocast: the state then.
        parameters: what trains in it.
    """

    module: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    autocast: AutocastState
    parameters: tuple[torch.Tensor, ...]


class HeadCall:
    """``operations`` on ``head(hidden)``, computed when somebody asks.

    Args:
        head: what was called.
        hidden: [..., H], as it was called with, with its graph.
        operations: done with the logits since, in their order.
        sample: [0, V], what they have become, without rows.
        watched: tensors that must still be what they were, each with its version.
        recorded: whether the call belongs to a graph.
    """

    def __init__(
        self,
        head: Head,
        hidden: torch.Tensor,
        operations: tuple[Operation, ...],
        sample: torch.Tensor,
        watched: tuple[tuple[torch.Tensor, int], ...],
        recorded: bool,
    ) -> None:
        self.head = head
        self.hidden = hidden
        self.operations = operations
        self.sample = sample
        self.watched = watched
        self.recorded = recorded
        self._values: torch.Tensor | None = None
        self._leaf: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    @classmethod
    def begin(cls, module: nn.Module, forward: Callable[..., Any], hidden: torch.Tensor) -> HeadCall:
        """The call ``forward(hidden)``; runs it on no rows, to see what would come out of it."""
        autocast = AutocastState.capture(hidden.device)
        # No view of `hidden`, whose graph is not asked for. Under a plain head its own parameters are all there is.
        output = forward(hidden.detach().reshape(-1, hidden.shape[-1])[:0])
        parameters: Sequence[torch.Tensor] = ()
        if torch.is_grad_enabled():
            own = [parameter for parameter in parameters_of(module) if parameter.requires_grad]
            parameters = own if type(module) is nn.Linear else leaves_behind(output)
        head = Head(module, forward, autocast, tuple(parameters))
        everything = {id(tensor): tensor for tensor in (hidden, *parameters, *parameters_of(module))}
        watched = tuple((tensor, version_of(tensor)) for tensor in everything.values())
        recorded = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
        return cls(head, hidden, (), output.detach(), watched, recorded)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.sample.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        return self.sample.dtype

    def of(self, hidden: torch.Tensor) -> HeadCall:
        """The same for a selection of its rows, or for them in another arrangement."""
        recorded = self.recorded and torch.is_grad_enabled()
        watched = ((hidden, version_of(hidden)), *self.watched)
        return HeadCall(self.head, hidden, self.operations, self.sample, watched, recorded)

    def then(self, operation: Operation, operands: Sequence[torch.Tensor] = ()) -> HeadCall:
        """The same with one more operation, which reads ``operands``."""
        with torch.no_grad():
            sample = operation(self.sample.clone())
        watched = (*self.watched, *((operand, version_of(operand)) for operand in operands))
        recorded = self.recorded and torch.is_grad_enabled()
        return HeadCall(self.head, self.hidden, (*self.operations, operation), sample, watched, recorded)

    def without_graph(self) -> HeadCall:
        """The same, with nothing of it recorded."""
        head = replace(self.head, parameters=())
        return HeadCall(head, self.hidden.detach(), self.operations, self.sample, self.watched, False)

    def check(self) -> None:
        """Refuse to compute other logits than those that the call would have given.

        Raises:
            ReversibleUsageError: what the head reads was written to since, or is not whole any more.
        """
        if any(version_of(tensor) != version for tensor, version in self.watched):
            raise ReversibleUsageError(
                "logits are computed when they are first read, and what they are computed from (the head's weights, or "
                "the hidden states) has changed since the forward: read output.logits before the optimizer's step, or "
                'take loss="full"'
            )
        if any(isinstance(parameter, DTensor) for parameter in parameters_of(self.head.module)):
            raise ReversibleUsageError(
                "logits are computed when they are first read, and fully_shard has taken the head's weights apart "
                'since the forward: take loss="full" to read output.logits after it'
            )

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of any rows [..., H]."""
        with self.head.autocast.restored():
            logits = self.head.forward(hidden)
            for operation in self.operations:
                logits = operation(logits)
        return logits

    def values(self) -> torch.Tensor:
        """All logits, without a graph; computed once."""
        if self._values is None:
            self.check()
            with torch.set_grad_enabled(self.recorded):
                self._leaf = self.hidden.detach().requires_grad_(self.recorded and self.hidden.requires_grad)
                self._output = self.compute(self._leaf)
            self._values = self._output.detach()
        return self._values

    def gradients(self, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the hidden states and of the head's parameters, for one [..., V] of the logits."""
        self.values()
        assert self._leaf is not None and self._output is not None
        inputs = [tensor for tensor in (self._leaf, *self.head.parameters) if tensor.requires_grad]
        found = gradients_of([self._output], inputs, [gradient], retain_graph=True)
        return found if self._leaf.requires_grad else (None, *found)
