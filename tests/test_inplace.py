"""Kernels that write into what they are given: into gradients, as Liger's norms do, or into what all layers share.

``.data`` stands for a Triton kernel here: autograd's version counters see neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import meft_kernels

from .models import TRAINABLE_START, VARIANTS, pair, tiny_batch, tiny_llama, train_step, worst_error

FP32_BOUND = 1e-5
Hook = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


class NormIntoGradient(torch.autograd.Function):
    """A layer norm whose backward puts the input's gradient into the memory of the output's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = F.layer_norm(x, ctx.norm.normalized_shape, ctx.norm.weight, ctx.norm.bias, ctx.norm.eps)
        (dx,) = torch.autograd.grad(y, x, dy)
        dy.data.copy_(dx)
        return dy, None


class ScratchInBackward(torch.autograd.Function):
    """Hands its input on; its backward uses the memory of a tensor that it was given as scratch space."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scratch: torch.Tensor | None) -> torch.Tensor:
        y = x.clone()
        ctx.scratch = y.detach() if scratch is None else scratch
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.scratch.data.fill_(7.0)
        return dy, None


def _wrap(layer: nn.Module, before: Hook | None, after: Hook | None) -> None:
    """Put code in front of and behind a layer's own forward, before ``patch`` sees it."""
    own = layer.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if before is not None:
            hidden_states = before(hidden_states, kwargs)
        output = own(hidden_states, *args, **kwargs)
        return output if after is None else after(output, kwargs)

    layer.forward = forward


def _llama(before: Hook | None = None, after: Hook | None = None, **settings: Any) -> nn.Module:
    model = tiny_llama()
    for layer in model.model.layers:
        _wrap(layer, before, after)
    torch.manual_seed(5)
    return meft_kernels.patch(model, **TRAINABLE_START, **settings).train()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_last_norm_that_writes_into_its_gradient(variant: str) -> None:
    """The coupling needs the gradient of a layer's output once more after the layer's own backward."""
    model, oracle = pair("bert", variant=variant)
    batch = tiny_batch(model)
    _, expected = train_step(oracle, batch)
    for candidate in (model, oracle):
        for layer in candidate.bert.encoder.layer:
            norm = layer.output.LayerNorm
            norm.forward = lambda x, norm=norm: NormIntoGradient.apply(x, norm)
    assert worst_error(train_step(model, batch)[1], expected) <= FP32_BOUND
    assert worst_error(train_step(oracle, batch)[1], expected) <= FP32_BOUND


@pytest.mark.parametrize("variant", ["meft1", "meft2"])
def test_a_backward_that_writes_into_the_layers_output(variant: str) -> None:
    settings = {"variant": variant}
    _, expected = train_step(_llama(engine="autograd", **settings), tiny_batch(tiny_llama()))
    model = _llama(after=lambda output, kwargs: ScratchInBackward.apply(output, None), **settings)
    _, gradients = train_step(model, tiny_batch(model))
    assert worst_error(gradients, expected) <= FP32_BOUND


def _rotate_in_place(hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    kwargs["position_embeddings"][0].data.mul_(1.5)
    return hidden_states


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_shared_arguments_written_to_are_told(when: str) -> None:
    """Layer 0's recompute would see what the layers above left there."""

    def after(output: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        return ScratchInBackward.apply(output, kwargs["position_embeddings"][0])

    model = _llama(before=_rotate_in_place) if when == "forward" else _llama(after=after)
    with pytest.raises(meft_kernels.NotRepeatableError, match="changed in place"):
        train_step(model, tiny_batch(model))


def _halve_seen(hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return hidden_states.mul_(0.5)


def _halve_unseen(hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    hidden_states.data.mul_(0.5)
    return hidden_states


def _halve_a_copy(hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    return hidden_states - hidden_states.detach() * 0.5


@pytest.mark.parametrize("variant", ["meft1", "meft2"])
def test_a_layer_that_writes_into_its_input_is_told(variant: str) -> None:
    batch = tiny_batch(tiny_llama())
    for engine in ("reversible", "autograd"):
        model = _llama(before=_halve_seen, engine=engine, variant=variant, fraction_bits=16)
        with pytest.raises(RuntimeError, match=r"wrote into its own input|has been modified inplace"):
            model(**batch)
        with torch.no_grad(), pytest.raises(meft_kernels.ReversibleUsageError, match="wrote into its own input"):
            model(**batch)


def test_a_layer_that_writes_into_its_input_behind_autograds_back() -> None:
    """Unhurt where nobody else reads it (meft1), told where the next adapter does (meft2)."""
    batch = tiny_batch(tiny_llama())
    _, expected = train_step(_llama(before=_halve_a_copy, engine="autograd", variant="meft1"), batch)
    _, gradients = train_step(_llama(before=_halve_unseen, variant="meft1"), batch)
    assert worst_error(gradients, expected) <= FP32_BOUND
    with pytest.raises(meft_kernels.NotRepeatableError):
        train_step(_llama(before=_halve_unseen, variant="meft2"), batch)
