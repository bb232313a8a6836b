"""What a model's config says of its layers, by the names that transformers has for it."""

from __future__ import annotations

from typing import Any

HEADS = ("qa_outputs", "multiple_choice_head", "classification_head", "classifier", "score")
"""New heads, where a model has no base model inside, or a language model's head beside them."""
_ACTIVATIONS = (
    "hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation", "mlp_hidden_act", "act_fn",
    "hidden_activation_fn",
)  # fmt: skip
_DROPOUTS = (
    "hidden_dropout_prob", "resid_pdrop", "residual_dropout", "resid_dropout", "hidden_dropout", "mlp_dropout",
    "dropout_rate", "dropout",
)  # fmt: skip


def activation_of(config: Any) -> str:
    """Name of the activation, a key of ``ACT2FN``."""
    from transformers.activations import ACT2FN

    names = [getattr(config, name, None) for name in _ACTIVATIONS]
    return next((name for name in names if isinstance(name, str) and name in ACT2FN), "gelu")


def dropout_of(config: Any) -> float:
    """The hidden dropout probability."""
    rates = [getattr(config, name, None) for name in _DROPOUTS]
    return next((rate for rate in rates if isinstance(rate, float)), 0.0)


def layerdrop_of(config: Any, name: str) -> float:
    """The probability with which a layer of the list of this name is left out in training."""
    names = ["layerdrop", *(f"{side}_layerdrop" for side in ("encoder", "decoder") if side in name)]
    return max(float(getattr(config, name, 0.0) or 0.0) for name in names)
