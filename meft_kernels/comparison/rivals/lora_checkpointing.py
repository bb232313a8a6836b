"""LoRA with non-reentrant gradient checkpointing: one activation a layer is kept, and every layer computed twice."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Budget, Rival
from .lora import lora


def checkpoint(model: Any, **options: Any) -> None:
    """Turn non-reentrant checkpointing on, by the name that this transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):  # since 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False}, **options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, **options)


def lora_checkpointing(model: nn.Module, budget: Budget) -> nn.Module:
    """Every layer checkpointed."""
    made = lora(model, budget)
    checkpoint(made)
    return made


RIVALS = (Rival("lora_checkpointing", "LoRA + checkpointing", lora_checkpointing, packages=("peft",), dashed=True),)
