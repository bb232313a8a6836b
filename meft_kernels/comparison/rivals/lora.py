"""PEFT LoRA in every linear layer: trains few parameters and keeps every activation."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...packages import require
from .base import Budget, Rival, is_causal

HEADS = ("classifier", "score")
"""How PEFT knows the heads that it trains whole: by the end of a name, DistilBERT's ``pre_classifier`` among them."""


def linear_layers(model: Any) -> dict[str, Any]:
    """Every linear layer but those of a head, by name."""
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and not _in_head(name)
    }


def _in_head(name: str) -> bool:
    return name.split(".")[0].endswith(HEADS)


def lora_rank(model: Any, budget: Budget) -> int:
    """The rank that comes nearest to the budget. A classification head is trained whole, as it is beside ours."""
    head = sum(p.numel() for name, p in model.named_parameters() if _in_head(name))
    per_rank = sum(sum(module.weight.shape) for module in linear_layers(model).values())
    return max(1, round((budget.trainable - head) / per_rank))


def lora(model: Any, budget: Budget) -> Any:
    """LoRA with alpha = 2 r, PEFT's defaults otherwise."""
    peft = require("peft")
    rank = lora_rank(model, budget)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if is_causal(model) else "SEQ_CLS",  # SEQ_CLS trains and saves the head
        target_modules=list(linear_layers(model)),
        r=rank,
        lora_alpha=2 * rank,
    )
    return peft.get_peft_model(model, config)


RIVALS = (Rival("lora", "LoRA", lora, packages=("peft",)),)
