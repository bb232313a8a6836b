"""New adapters for a layer, as the settings and the model want them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..architectures import ArchitectureSpec, LayerSpec
from ..architectures.layer_lists import fitting
from ..config import MeftConfig
from ..engine.adapters import Adapter
from ..ops.coupling.api import FLOATS


def make_adapters(
    layer: nn.Module, kind: LayerSpec, hidden_size: int, model: Any, spec: ArchitectureSpec, config: MeftConfig
) -> dict[str, Adapter]:
    """One layer's adapters: ``ffn`` parallel to its FFN, ``stream`` for the other branch. None of them is inserted yet.

    Raises:
        ValueError: the activation is none that transformers knows.
        UnsupportedModelError: the family's spec does not fit the model.
    """
    if config.adapters == "none":
        return {}
    weight = next(parameter for parameter in layer.parameters())
    dtype = weight.dtype if weight.dtype in FLOATS else getattr(model, "dtype", torch.float32)  # packed otherwise
    with fitting(model):
        activation = config.activation or (kind.activation or spec.activation)(model.config)
        dropout = (kind.dropout or spec.dropout)(model.config) if config.dropout is None else config.dropout
    if activation not in ACT2FN:
        raise ValueError(f"activation {activation!r} is none of {', '.join(sorted(ACT2FN))}")
    return {
        name: Adapter(
            hidden_size,
            config.rank,
            activation,
            dropout,
            down_init_std=config.down_init_std,
            up_init_std=config.up_init_std,
            impl=config.impl,
            device=weight.device,
            dtype=torch.float32 if config.adapter_dtype == "float32" and dtype != torch.float64 else dtype,
        ).train(layer.training)
        for name in ("ffn", "stream")
    }
