"""OLMo-2: a decoder that norms what attention and MLP give, not what they read."""

from typing import Any

import torch

from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=hidden_states, **kwargs)[0]
    return hidden_states + layer.post_attention_layernorm(attended)


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.post_feedforward_layernorm(layer.mlp(hidden_states))


register_architecture(
    ArchitectureSpec(
        model_types=("olmo2",),
        layers=(
            LayerSpec(
                layer_class="Olmo2DecoderLayer",
                attention_block=_attention_block,
                mlp_block=_mlp_block,
                ffn_reads=lambda layer: layer.mlp,
                ffn_writes=lambda layer: layer.mlp,
            ),
        ),
        activation=lambda config: config.hidden_act,
    )
)
