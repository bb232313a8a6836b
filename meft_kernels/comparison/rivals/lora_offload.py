"""LoRA with checkpointing whose one activation a layer waits in pinned host memory."""

from __future__ import annotations

import inspect

from torch import nn

from .base import Budget, Rival, UnavailableRivalError
from .lora import lora
from .lora_checkpointing import checkpoint


def lora_offload(model: nn.Module, budget: Budget) -> nn.Module:
    """Transformers' own offload.

    Raises:
        UnavailableRivalError: this transformers (before 5.23) has none.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None or "offload" not in inspect.signature(enable).parameters:
        raise UnavailableRivalError("this transformers cannot offload checkpoints (5.23 can)")
    made = lora(model, budget)
    checkpoint(made, offload=True)
    return made


RIVALS = (
    Rival("lora_offload", "LoRA + checkpointing + offload", lora_offload, packages=("peft",), gpu=True, dashed=True),
)
