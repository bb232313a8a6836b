"""The autograd Functions: one per layer, plus one at the entry and one at the exit of a stack.

Streams never pass through autograd: integers carry no gradient. They live on a :class:`~meft_kernels.engine.tape.Tape`,
are updated in place, and the Functions' float outputs are *carriers* of gradient. The main stream's carrier is its copy
in the model's dtype, which is the ``hidden_states`` that the next layer wants anyway; the other stream's is one zero
expanded to full shape.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ReversibleUsageError
from .step import Step
from .tape import Tape


def carrier_of(stream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor with the stream's shape, no memory of its own, and a gradient of full shape."""
    return torch.zeros((), dtype=dtype, device=stream.device).expand(stream.shape)


class Enter(torch.autograd.Function):
    """Hidden states to the carriers (other, main) of the two streams, both of which start from them."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, tape: Tape) -> tuple[torch.Tensor, torch.Tensor]:
        return carrier_of(tape.x1, tape.dtype), tape.arithmetic.value(tape.x2, tape.dtype)

    @staticmethod
    def backward(ctx: Any, d_other: torch.Tensor, d_main: torch.Tensor) -> tuple[torch.Tensor, None]:
        return d_other + d_main, None


class Exit(torch.autograd.Function):
    """Carriers to the read-out ``w1 * x1 + w2 * x2``."""

    @staticmethod
    def forward(ctx: Any, other: torch.Tensor, main: torch.Tensor, tape: Tape) -> torch.Tensor:
        ctx.weights, ctx.handed_down = tape.readout, tape.handed_down
        return tape.read_out()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        w1, w2 = ctx.weights
        made = gradient * w1, gradient * w2
        ctx.handed_down.give(*made)
        return *made, None


class Reversible(torch.autograd.Function):
    """One layer that keeps no activations: carriers (other, main) in, carriers (other, main) and extras out.

    Every tensor that needs a gradient is an explicit input, so each gets it exactly once, from autograd: DDP's hooks
    fire once, gradient accumulation is plain, and the hidden states themselves need not require a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, step: Step, other: torch.Tensor, main: torch.Tensor, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.step = step
        value = step.forward(main, recording=True)
        return carrier_of(step.tape.x1, step.tape.dtype), value, *step.extras.differentiable()

    @staticmethod
    def backward(
        ctx: Any, d_other: torch.Tensor, d_main: torch.Tensor, *d_extras: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        handed_down = ctx.step.tape.handed_down
        owned = handed_down.owns(d_other), handed_down.owns(d_main)
        wants_input = any(ctx.needs_input_grad[1:3])
        with torch.no_grad():
            d_other_in, d_main_in, gradients = ctx.step.backward(
                d_other, d_main, d_extras, owned=owned, wants_input=wants_input
            )
        made = d_other_in, d_main_in, *gradients
        if torch.is_grad_enabled():  # create_graph=True
            made = _FirstDerivatives.apply(torch.ones((), requires_grad=True), *made)
        return None, *made


class _FirstDerivatives(torch.autograd.Function):
    """Gradients of a layer, as tensors that have none of their own. ``anchor`` needs a gradient, so that they do."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        raise ReversibleUsageError(
            "reversible layers have first derivatives only (gradient penalties, Hessian products and create_graph=True "
            "want second ones): patch with engine='autograd'"
        )
