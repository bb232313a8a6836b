"""PEFT LoRA in every linear layer: trains few parameters and keeps every activation."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...packages import require
from .base import Budget, Rival, is_causal

HEADS = ("classifier", "score")


def lora_rank(model: Any, budget: Budget) -> int:
    """The rank that comes nearest to the budget. A classification head is trained whole, as it is beside ours."""
    head = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in HEADS)
    output = model.get_output_embeddings()
    per_rank = sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and name.split(".")[0] not in HEADS
    )
    return max(1, round((budget.trainable - head) / per_rank))


def lora(model: Any, budget: Budget) -> Any:
    """LoRA with alpha = 2 r, PEFT's defaults otherwise."""
    peft = require("peft")
    rank = lora_rank(model, budget)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if is_causal(model) else "SEQ_CLS",  # SEQ_CLS trains and saves the head
        target_modules="all-linear",
        r=rank,
        lora_alpha=2 * rank,
    )
    return peft.get_peft_model(model, config)


RIVALS = (Rival("lora", "LoRA", lora, packages=("peft",)),)
