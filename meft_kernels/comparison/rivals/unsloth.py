"""Unsloth's LoRA and its own offloaded checkpointing."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...packages import require
from .base import Budget, Rival, UnavailableRivalError, is_causal
from .lora import lora_rank


def unsloth(model: Any, budget: Budget) -> nn.Module:
    """Unsloth wants to have loaded the model itself: what it is not able to take, it says.

    Raises:
        UnavailableRivalError: it cannot take this model.
    """
    fast = require("unsloth", "pip install unsloth").FastLanguageModel
    if not is_causal(model):
        raise UnavailableRivalError("Unsloth takes causal language models")
    rank = lora_rank(model, budget)
    try:
        made: nn.Module = fast.get_peft_model(
            model, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, use_gradient_checkpointing="unsloth"
        )
    except Exception as error:
        raise UnavailableRivalError(f"Unsloth: {type(error).__name__}: {error}") from error
    return made


RIVALS = (Rival("unsloth", "Unsloth", unsloth, packages=("unsloth",), gpu=True, dashed=True),)
