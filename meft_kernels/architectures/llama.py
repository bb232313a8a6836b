"""Llama and its kin: pre-norm decoders with a gated MLP, or with a mixture of experts in the MLP's place.

Their layers differ inside the attention (Qwen3 norms queries and keys, SmolLM3 leaves rotary embeddings out of some
layers, Mistral and Qwen2 slide a window), which is called as it is. A router's choice repeats because the same bits
reach it twice.
"""

from typing import Any

import torch

from .attention import AttentionPieces, attend, merge_heads, rotated, split_heads
from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
    return hidden_states + attended


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def _project(layer: Any, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
    attention = layer.self_attn
    x = layer.input_layernorm(hidden_states)
    size = attention.head_dim
    queries, keys, values = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    if hasattr(attention, "q_norm"):  # Qwen3: of every head
        queries = attention.q_norm(queries.view(*x.shape[:-1], -1, size)).transpose(1, 2)
        keys = attention.k_norm(keys.view(*x.shape[:-1], -1, size)).transpose(1, 2)
    else:
        queries, keys = split_heads(queries, size), split_heads(keys, size)
    if getattr(attention, "use_rope", True):
        queries, keys = rotated(attention, queries, keys, position_embeddings)
    return queries, keys, split_heads(values, size)


def _attend(layer: Any, *heads: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attention = layer.self_attn
    if not type(layer).__name__.startswith("Llama"):
        everywhere = getattr(attention.config, "sliding_window", None)
        kwargs["sliding_window"] = getattr(attention, "sliding_window", everywhere)
    return attend(attention, heads, dropout=attention.attention_dropout, scaling=attention.scaling, **kwargs)


def _output(layer: Any, hidden_states: torch.Tensor, attended: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.self_attn.o_proj(merge_heads(attended))


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
                attention_pieces=AttentionPieces(
                    project=_project,
                    attend=_attend,
                    output=_output,
                    replaces=lambda layer: (layer.self_attn,),
                    by_position=("position_embeddings",),
                ),
                ffn_reads=lambda layer: layer.mlp,
                ffn_writes=lambda layer: layer.mlp,
            ),
        ),
        activation=lambda config: config.hidden_act,
    )
)
