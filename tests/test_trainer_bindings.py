"""Trainers that turn gradient checkpointing on by themselves find a patched model as it was."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import meft_kernels

from .architectures.zoo import batch_for, tiny
from .models import TRAINABLE_START, train_step, worst_error

FAMILIES = ["llama", "bert", "t5", "opt", "gpt2"]


def flags(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_left_off(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = meft_kernels.patch(tiny(family), fraction_bits=16, **TRAINABLE_START).train()
    batch = batch_for(model)
    loss, expected = train_step(model, batch)
    with caplog.at_level(logging.INFO):
        model.gradient_checkpointing_enable()
    assert "gradient checkpointing is left off: reversible layers keep no activations" in caplog.text
    again, found = train_step(model, batch)
    assert again == loss
    assert worst_error(found, expected) == 0
    model.gradient_checkpointing_disable()
    assert flags(model) == []
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    assert flags(twin) == []
    assert train_step(twin, batch)[0] == loss
    meft_kernels.unpatch(model)
    model.gradient_checkpointing_enable()
    assert flags(model)


def test_layers_that_keep_their_activations_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = meft_kernels.patch(tiny("llama"), reversible_layers=1, **TRAINABLE_START)
    model.gradient_checkpointing_enable()
    assert "keep their activations" in caplog.text


def test_other_parts_are_checkpointed() -> None:
    """The layers below ``frozen_layers`` are not ours; patching a decoder leaves the encoder alone."""
    model = meft_kernels.patch(tiny("llama"), frozen_layers=1, **TRAINABLE_START).train()
    model.gradient_checkpointing_enable()
    assert flags(model) == ["model.layers.0"]
    batch = batch_for(model)
    loss = model(**batch).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.isfinite(loss)
