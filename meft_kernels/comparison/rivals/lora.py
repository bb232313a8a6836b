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


def _widths(module: Any) -> int:
    """Inputs and outputs; a quantised layer's weight does not have their shape."""
    return module.in_features + module.out_features if isinstance(module, nn.Linear) else sum(module.weight.shape)


def lora_rank(model: Any, budget: Budget) -> int:
    """The rank that comes nearest to the budget. A classification head is trained whole, as it is beside ours."""
    head = sum(p.numel() for name, p in model.named_parameters() if _in_head(name))
    per_rank = sum(_widths(module) for module in linear_layers(model).values())
    return max(1, round((budget.trainable - head) / per_rank))


def lora(model: Any, budget: Budget) -> Any:
    """LoRA with alpha = 2 r, PEFT's defaults otherwise: its weights are float32 unless ``adapter_dtype="model"``."""
    peft = require("peft")
    rank = lora_rank(model, budget)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if is_causal(model) else "SEQ_CLS",  # SEQ_CLS trains and saves the head
        target_modules=list(linear_layers(model)),
        r=rank,
        lora_alpha=2 * rank,
    )
    if budget.config.adapter_dtype == "float32":
        return peft.get_peft_model(model, config)
    dtype = model.dtype
    made = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.detach().to(dtype)
    return made


RIVALS = (Rival("lora", "LoRA", lora, packages=("peft",)),)
