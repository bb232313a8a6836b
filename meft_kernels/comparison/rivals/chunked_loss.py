"""The loss without whole logits, as TRL, Liger and cut-cross-entropy give it to any rival: here by our own."""

from __future__ import annotations

from typing import Any

from ...loss import bind_loss
from ...patching.state import unwrap
from .base import is_causal


def chunked_loss(model: Any) -> None:
    """Bind it. A classifier, which has no head over a vocabulary, is left as it is."""
    if is_causal(unwrap(model)):
        bind_loss(model)
