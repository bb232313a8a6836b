"""What goes on between two layers: who may look at the hidden states there, and what stands in the graph.

A layer hands on its main stream, which is enough for the next one. To everybody else that stream alone is not what the
layer gives (meft2's lags by a layer), and its gradient is not that of the hidden states. Where somebody may look, a
:class:`Seam` hands on the read-out instead, and brings its gradient together.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.modules import module as _every_module

from ..errors import ReversibleUsageError
from .layer import PatchedLayer
from .reversible import carrier_of
from .tape import Tape

_LOOK_AWAY = ("torch.distributed.", "transformers.utils.output_capturing")
"""Where hooks come from that do not look: FSDP's, which gather weights; transformers' own, which do when the call asks
for hidden states, and then there is a seam."""

_BACKWARD_HOOKS = "BackwardHookFunctionBackward"
_IDENTITIES = (
    "RegisterPostBackwardFunctionBackward",  # fully_shard's, which takes the weights apart again
    _BACKWARD_HOOKS,  # of a module's full backward hooks
    "ViewBackward0",
    "AliasBackward0",
)
"""Nodes that hand their gradient on as it is, where the values and their places are the same."""


def hooks_between(layer: PatchedLayer, following: PatchedLayer) -> list[Any]:
    """All that is called, or called in backward, with the hidden states between two layers."""
    module, after = layer.module, following.module
    registered = (
        module._forward_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        after._forward_pre_hooks,
        after._backward_hooks,
        after._backward_pre_hooks,
        _every_module._global_forward_hooks,
        _every_module._global_forward_pre_hooks,
        _every_module._global_backward_hooks,
        _every_module._global_backward_pre_hooks,
    )
    return [hook for hooks in registered for hook in hooks.values()] if any(registered) else []


def may_look(layer: PatchedLayer, following: PatchedLayer, hooks: list[Any]) -> bool:
    """Whether anybody else than the two layers may read the hidden states, or their gradient."""
    if not (layer.is_bound and following.is_bound):
        return True  # somebody's wrapper around a forward
    return bool(hooks) and not all(str(getattr(hook, "__module__", None)).startswith(_LOOK_AWAY) for hook in hooks)


class Seam:
    """The hidden states between two layers, handed on as the read-out of both streams.

    Their gradient, which hooks see, is that of a change of both streams by the same amount: the sum of the streams'.
    What it is made of goes beside it, so that nothing is lost, not even in the last bit; what others add (a loss on
    these hidden states) reaches the streams as it does through any read-out.
    """

    def __init__(self, tape: Tape, where: str) -> None:
        self._where = where
        self._weights = tape.readout
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sent: tuple[torch.Tensor, int] | None = None
        self._arrived: tuple[torch.Tensor, int] | None = None

    def send(self, d_other: torch.Tensor, d_main: torch.Tensor) -> torch.Tensor:
        """The gradient of the hidden states, from those of the two streams above."""
        sent = d_other + d_main
        self._given, self._sent = (d_other, d_main), (sent, sent._version)
        return sent

    def note(self, gradient: torch.Tensor) -> None:
        """The first hook on the hidden states: this is what arrives, before other hooks have their turn."""
        self._arrived = gradient, gradient._version

    def receive(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the two streams below.

        Raises:
            ReversibleUsageError: a hook has changed the gradient of the hidden states.
        """
        given, sent, arrived = self._given, self._sent, self._arrived
        self._given = self._sent = self._arrived = None
        if arrived is not None:
            _refuse_change(arrived, gradient, f"the hidden states that {self._where} handed on")
        w1, w2 = self._weights
        if given is None or sent is None:  # no layer above was reached
            return gradient * w1, gradient * w2
        _refuse_change(sent, sent[0], f"the hidden states that {self._where} handed on")  # in place
        if gradient is sent[0]:
            return given
        more = gradient - sent[0]
        return given[0] + more * w1, given[1] + more * w2


class HandOn(torch.autograd.Function):
    """Carriers (other, main) to the read-out that a seam hands on."""

    @staticmethod
    def forward(ctx: Any, other: torch.Tensor, main: torch.Tensor, tape: Tape, seam: Seam) -> torch.Tensor:
        ctx.seam = seam
        return tape.read_out()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.seam.receive(gradient), None, None


class TakeUp(torch.autograd.Function):
    """The hidden states that a seam has handed on to carriers (other, main)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, main: torch.Tensor, tape: Tape, seam: Seam
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.seam = seam
        return carrier_of(tape.x1, tape.dtype), main

    @staticmethod
    def backward(ctx: Any, d_other: torch.Tensor, d_main: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.seam.send(d_other, d_main), None, None, None


def hand_on(seam: Seam, other: torch.Tensor, main: torch.Tensor, tape: Tape) -> torch.Tensor:
    """The read-out, for whoever comes next."""
    handed_on: torch.Tensor = HandOn.apply(other, main, tape, seam)
    if handed_on.requires_grad:
        handed_on.register_hook(seam.note)
    return handed_on


def take_up(seam: Seam, given: torch.Tensor, main: torch.Tensor, tape: Tape) -> tuple[torch.Tensor, torch.Tensor]:
    """Carriers (other, main) for the next layer; ``main`` holds the main stream's value."""
    other, main = TakeUp.apply(given, main.detach(), tape, seam)
    return other, main


def check_graph(name: str, given: torch.Tensor, handed_on: torch.Tensor) -> None:
    """Hold the graph between two layers against the tensor that the first of them handed on, whose values are the same.

    Raises:
        ReversibleUsageError: something stands there that gradients of the two streams cannot go through.
    """
    node, place = given.grad_fn, given.output_nr
    while node is not handed_on.grad_fn and getattr(node, "variable", None) is not handed_on:
        kind = None if node is None else type(node).__name__
        if node is None or kind not in _IDENTITIES:
            raise ReversibleUsageError(
                f"{'detach()' if kind is None else kind} stands in the graph between {name} and the layer before. What "
                "goes from layer to layer are two streams, whose gradients it would not meet both: change gradients "
                "inside of a layer; to train the layers above alone, pass frozen_layers to patch"
            )
        if kind == _BACKWARD_HOOKS:
            node.register_hook(functools.partial(_hold, name, place))
        node, place = node.next_functions[place]


def _hold(
    name: str, place: int, d_inputs: tuple[torch.Tensor | None, ...], d_outputs: tuple[torch.Tensor | None, ...]
) -> None:
    """After a module's own backward hooks: what they were given goes on."""
    given, handed_on = d_outputs[place], d_inputs[place]
    if given is not None and handed_on is not None:
        _refuse_change((given, given._version), handed_on, f"the hidden states between {name} and the layer before")


def _refuse_change(before: tuple[torch.Tensor, int], after: torch.Tensor, whose: str) -> None:
    gradient, version = before
    if gradient._version == version and (gradient is after or torch.equal(gradient, after)):
        return
    raise ReversibleUsageError(
        f"a hook changed the gradient of {whose}. It is the sum of two streams' gradients, which the change would not "
        "meet both: hooks between layers may read it; change gradients inside of a layer, below all of them or above"
    )
