"""The methods that the demo trains side by side, each made ready on a fresh copy of the same pretrained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..packages import require

Method = Literal["meft", "lora", "lora_checkpointing"]
METHODS: tuple[Method, ...] = ("meft", "lora", "lora_checkpointing")
TITLES: dict[str, str] = {
    "meft": "MEFT",
    "lora": "LoRA",
    "lora_checkpointing": "LoRA + checkpointing",
}


@dataclass(frozen=True)
class Recipe:
    """Settings that differ by kind of model. The command line can change most of them."""

    steps: int
    batch_size: int
    max_length: int
    held_out: int
    lr: float
    lora_lr: float
    rank: int
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    meft: dict[str, Any] = field(default_factory=dict)


# From single runs with seed 100, which is none of the demo's seeds. MiniLM, 150 steps of 16, 1024 held-out texts
# (standard error 1.2 points): LoRA 80.2 % at 1e-3 and diverging at 3e-3; meft2 81.2 % at 1e-3 and 80.4 % at 2e-3; meft1
# 78.8 % at 1e-3.
_ENCODER = Recipe(
    steps=200,
    batch_size=16,
    max_length=128,
    held_out=1024,
    lr=1e-3,
    lora_lr=1e-3,
    rank=64,
    meft={"down_init_std": 0.05},
)
_CAUSAL = Recipe(
    steps=80,
    batch_size=8,
    max_length=128,
    held_out=256,
    lr=1e-3,
    lora_lr=1e-3,
    rank=64,
)


def recipe_for(*, causal: bool) -> Recipe:
    """The settings for an encoder with a new head, or for a causal language model."""
    return _CAUSAL if causal else _ENCODER


def prepare_lora(model: nn.Module, *, trainable: int, causal: bool, checkpointing: bool) -> tuple[nn.Module, int]:
    """PEFT LoRA in every linear layer, with the rank that comes nearest to ``trainable`` parameters; model and rank.

    A classification head is trained whole, as it is beside the MEFT adapters.
    """
    peft = require("peft")
    heads = () if causal else ("classifier", "score")
    head = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in heads)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    per_rank = sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and name.split(".")[0] not in heads
    )
    rank = max(1, round((trainable - head) / per_rank))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",  # SEQ_CLS trains and saves the head
        target_modules="all-linear",
        r=rank,
        lora_alpha=2 * rank,
    )
    made = peft.get_peft_model(model, config)
    if checkpointing:
        options = {"use_reentrant": False}
        if hasattr(made, "activation_checkpointing_enable"):  # the name since transformers 5.23
            made.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return made, rank
