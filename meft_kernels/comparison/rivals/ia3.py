"""(IA)3: a trained factor for every key, value and inner activation; far fewer parameters than the others."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...architectures.layer_lists import find_layers
from ...packages import require
from ...patching.targets import find_spec
from .base import Budget, Rival, UnavailableRivalError, is_causal

# Each family's keys and values, fused where it fuses them.
_ATTENTION = ("k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "k_lin", "v_lin", "k", "v")
_ATTENTION_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")


def targets(model: Any, budget: Budget) -> tuple[list[str], list[str]]:
    """Names of the linear layers that get a factor, and of those among them whose *input* gets it.

    Raises:
        UnavailableRivalError: the family's attention has none of the known names.
    """
    spec = find_spec(model, budget.config)
    attention, feedforward = [], []
    names = {id(module): name for name, module in model.named_modules()}
    for found in find_layers(model, spec, budget.config.stacks):
        for layer in found.layers:
            writes = found.spec.ffn_writes(layer)
            inner = [m for m in writes.modules() if isinstance(m, nn.Linear | Conv1D)]
            feedforward += [names[id(linear)] for linear in inner[-1:]]
            for name, module in layer.named_modules():
                if name.rsplit(".", 1)[-1] in (*_ATTENTION, *_ATTENTION_FUSED) and hasattr(module, "weight"):
                    attention.append(names[id(module)])
    if not attention or not feedforward:
        raise UnavailableRivalError(f"(IA)3 finds no keys, values or feed-forward layers in {type(model).__name__}")
    return [*attention, *feedforward], feedforward


def ia3(model: nn.Module, budget: Budget) -> Any:
    """PEFT's (IA)3, at the places of the paper (Liu et al. 2022)."""
    peft = require("peft")
    everywhere, feedforward = targets(model, budget)
    config = peft.IA3Config(
        task_type="CAUSAL_LM" if is_causal(model) else "SEQ_CLS",
        target_modules=everywhere,
        feedforward_modules=feedforward,
    )
    return peft.get_peft_model(model, config)


RIVALS = (Rival("ia3", "(IA)3", ia3, lr=5e-3, packages=("peft",)),)
