"""Phi-3: Llama's layout with dropout before each residual sum."""

from typing import Any

import torch

from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
    return hidden_states + layer.resid_attn_dropout(attended)


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.resid_mlp_dropout(layer.mlp(layer.post_attention_layernorm(hidden_states)))


register_architecture(
    ArchitectureSpec(
        model_types=("phi3",),
        layers=(
            LayerSpec(
                layer_class="Phi3DecoderLayer",
                attention_block=_attention_block,
                mlp_block=_mlp_block,
                ffn_reads=lambda layer: layer.mlp,
                ffn_writes=lambda layer: layer.mlp,
            ),
        ),
        activation=lambda config: config.hidden_act,
        dropout=lambda config: config.resid_pdrop,
    )
)
