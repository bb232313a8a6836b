"""The paper's own scheme: float streams and its coefficients, whose inverse drifts with depth."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ...config import MeftConfig
from ...patching.patch import patch
from .base import Budget, Rival


def paper(model: nn.Module, budget: Budget, *, variant: Any) -> nn.Module:
    """``MeftConfig.paper(variant)`` in every layer (the authors' recipes for OPT make 8 of 24 reversible)."""
    return patch(model, MeftConfig.paper(variant, rank=budget.config.rank))


RIVALS = tuple(
    Rival(f"{variant}_paper", f"{variant} as in the paper", functools.partial(paper, variant=variant), reversible=True)
    for variant in ("meft1", "meft2", "meft3")
)
