"""Full fine-tuning: every parameter is trained, and every activation is kept."""

from __future__ import annotations

from torch import nn

from .base import Budget, Rival


def full(model: nn.Module, budget: Budget) -> nn.Module:
    """The model as it is."""
    return model.requires_grad_(True)


RIVALS = (Rival("full", "full fine-tuning", full, lr=5e-5, whole=True),)
