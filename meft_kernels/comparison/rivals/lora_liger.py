"""LoRA with Liger-Kernel's norms, SwiGLU, RoPE and fused loss, alone and with checkpointing."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...packages import require
from .base import Budget, Rival, UnavailableRivalError
from .lora import lora
from .lora_checkpointing import checkpoint


def _liger(model: Any) -> None:
    module = require("liger_kernel.transformers.monkey_patch", "pip install liger-kernel")
    if model.config.model_type not in module.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UnavailableRivalError(f"Liger-Kernel has nothing for {model.config.model_type}")
    module._apply_liger_kernel_to_instance(model=model)


def lora_liger(model: nn.Module, budget: Budget) -> nn.Module:
    """Liger's kernels in this model, then LoRA.

    Raises:
        UnavailableRivalError: Liger does not know this family.
    """
    _liger(model)
    return lora(model, budget)


def lora_liger_checkpointing(model: nn.Module, budget: Budget) -> nn.Module:
    """The same, every layer checkpointed."""
    made = lora_liger(model, budget)
    checkpoint(made)
    return made


_NEEDS = ("peft", "liger_kernel")
RIVALS = (
    Rival("lora_liger", "LoRA + Liger", lora_liger, packages=_NEEDS, gpu=True, dashed=True),
    Rival(
        "lora_liger_checkpointing",
        "LoRA + Liger + checkpointing",
        lora_liger_checkpointing,
        packages=_NEEDS,
        gpu=True,
        dashed=True,
    ),
)
