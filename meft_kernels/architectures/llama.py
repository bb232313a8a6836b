"""Llama and its kin: pre-norm decoders with a gated MLP, or with a mixture of experts in the MLP's place.

Their layers differ inside the attention (Qwen3 norms queries and keys, SmolLM3 leaves rotary embeddings out of some
layers, Mistral and Qwen2 slide a window), which is called as it is. A router's choice repeats because the same bits
reach it twice.
"""

from typing import Any

import torch

from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
    return hidden_states + attended


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


register_architecture(
    ArchitectureSpec(
        model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3", "mixtral", "qwen3_moe"),
        layers=(
            LayerSpec(
                layer_class=(
                    "LlamaDecoderLayer",
                    "MistralDecoderLayer",
                    "Qwen2DecoderLayer",
                    "Qwen3DecoderLayer",
                    "SmolLM3DecoderLayer",
                    "MixtralDecoderLayer",
                    "Qwen3MoeDecoderLayer",
                ),
                attention_block=_attention_block,
                mlp_block=_mlp_block,
                ffn_reads=lambda layer: layer.mlp,
                ffn_writes=lambda layer: layer.mlp,
            ),
        ),
        activation=lambda config: config.hidden_act,
    )
)
