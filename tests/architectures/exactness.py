"""What the tests of the families share: patched models, one training step, and what exact means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import meft_kernels

from ..models import TRAINABLE_START, VARIANTS, StreamWitness
from .zoo import ZOO, loss_of, skip_reason

FP32_BOUND = 1e-5
"""Gradients of two evaluations in float32 that differ in the order of a few additions: measured 1e-9 to 3e-7."""

CASES = [(name, variant) for name in ZOO for variant in VARIANTS if skip_reason(name, variant) is None]
"""Every family with every variant that fits it."""


def patched(model: Any, **settings: Any) -> Any:
    """Adapters that already do something, the same ones each time."""
    torch.manual_seed(5)
    return meft_kernels.patch(model, **{**TRAINABLE_START, **settings})


def step(model: Any, batch: dict[str, Any], seed: int = 2) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients under fixed random numbers."""
    torch.manual_seed(seed)
    loss = loss_of(model(**batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradients


def both_engines(
    make: Callable[[str], Any], run: Callable[[Any], tuple[float, dict[str, torch.Tensor]]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of the reversible engine and of plain autograd, once all inputs came back and the losses are equal.

    ``make`` gives the same model for each engine, ``run`` its loss and gradients.
    """
    model = make("reversible")
    witnesses = StreamWitness.on_every_stack(model)
    loss, found = run(model)
    assert_exact(witnesses)
    expected_loss, expected = run(make("autograd"))
    assert loss == expected_loss
    return found, expected


def outputs_of(output: Any) -> list[torch.Tensor]:
    """What a caller looks at; losses and caches left out."""
    return [value.detach() for key, value in output.items() if isinstance(value, torch.Tensor) and key != "loss"]


def assert_exact(witnesses: list[StreamWitness]) -> None:
    assert witnesses
    for witness in witnesses:
        assert witness.before.keys() == witness.equal.keys()
        assert witness.equal, "no layer was reversible"
        assert all(witness.equal.values()), witness.equal


def everything_of(model: nn.Module) -> list[Any]:
    """What a model is: its attributes by identity, its tensors by value, its hooks and modes."""
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, dict):
                found.append((name, [(key, id(each)) for key, each in value.items()]))
            else:
                found.append((name, id(value) if not isinstance(value, bool | int | str) else value))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append((tensor.requires_grad, tensor.grad is None, tensor.double().sum().item()))
    return found
