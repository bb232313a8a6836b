"""What the engine must know about a family of models, and nothing more. README.md beside this file has an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .layer_spec import LayerSpec, check_callables

__all__ = ["ArchitectureSpec", "LayerSpec"]

if TYPE_CHECKING:
    from ..config import MeftConfig


def _hidden_size(config: Any) -> int:
    return int(config.hidden_size)


def _no_dropout(config: Any) -> float:
    return 0.0


def _no_objection(config: Any, settings: MeftConfig) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec:
    """A family of models: its kinds of layers, and what of its config the adapters follow."""

    model_types: tuple[str, ...]
    """Values of ``config.model_type`` that this spec serves."""
    layers: tuple[LayerSpec, ...]
    """Every kind of layer: one for most, two for encoder and decoder."""
    activation: Callable[[Any], str]
    """Name of the backbone's activation (a key of transformers' ``ACT2FN``), from the model's config."""
    dropout: Callable[[Any], float] = _no_dropout
    """The backbone's hidden dropout probability, from the model's config."""
    hidden_size: Callable[[Any], int] = _hidden_size
    """Width of the hidden states, from the model's config."""

    head_modules: tuple[str, ...] = ()
    """Children of the base model that only task heads read; they are trained along with a new head."""

    extra_heads: tuple[str, ...] = ()
    """Children of a whole model that are new heads where its structure does not show it: a head on a model that has no
    base model inside, or one that sits beside a language-model head."""

    objection: Callable[[Any, MeftConfig], str | None] = _no_objection
    """``(model's config, settings) -> reason`` why this model cannot be patched with these settings, and what to do
    instead; None if it can."""

    notes: str = ""
    """What a user of the family must know, for the table of supported models."""

    def __post_init__(self) -> None:
        for name, kind in (("model_types", str), ("layers", LayerSpec)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or not all(isinstance(value, kind) for value in values):
                raise TypeError(f"{name} must be a tuple of at least one {kind.__name__}, got {values!r}")
        check_callables(self, "activation", "dropout", "hidden_size", "objection")
