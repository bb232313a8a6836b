"""What people would use instead of MEFT, and MEFT: each makes a model ready to train, behind one interface.

A rival is a small file here that makes one or more :class:`Rival`; :data:`RIVALS` has them all by name.
"""

from __future__ import annotations

from . import (
    bottleneck,
    full,
    ia3,
    lora,
    lora_checkpointing,
    lora_lean,
    lora_liger,
    lora_offload,
    meft,
    paper,
    unsloth,
)
from .base import Budget, Rival, UnavailableRivalError

_MODULES = (
    meft, paper, full, lora, lora_checkpointing, lora_lean, lora_offload, lora_liger, unsloth, ia3, bottleneck
)  # fmt: skip
RIVALS: dict[str, Rival] = {rival.name: rival for module in _MODULES for rival in module.RIVALS}

__all__ = ["RIVALS", "Budget", "Rival", "UnavailableRivalError", "rivals_named"]


def rivals_named(names: list[str] | tuple[str, ...]) -> list[Rival]:
    """The rivals of these names, in this order.

    Raises:
        ValueError: there is none of a name.
    """
    if unknown := [name for name in names if name not in RIVALS]:
        raise ValueError(f"{', '.join(unknown)} is none of the rivals {', '.join(RIVALS)}")
    return [RIVALS[name] for name in names]
