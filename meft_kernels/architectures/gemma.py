"""Gemma 2 and Gemma 3 (text): four norms, one before and one after each of attention and MLP."""

from typing import Any

import torch

from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
    return hidden_states + layer.post_attention_layernorm(attended)


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    written = layer.mlp(layer.pre_feedforward_layernorm(hidden_states))
    return hidden_states + layer.post_feedforward_layernorm(written)


register_architecture(
    ArchitectureSpec(
        model_types=("gemma2", "gemma3_text"),
        layers=(
            LayerSpec(
                layer_class=("Gemma2DecoderLayer", "Gemma3DecoderLayer"),
                attention_block=_attention_block,
                mlp_block=_mlp_block,
                ffn_reads=lambda layer: layer.mlp,
                ffn_writes=lambda layer: layer.mlp,
            ),
        ),
        activation=lambda config: config.hidden_activation,
    )
)
