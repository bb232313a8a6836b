"""Phi-3: Llama's layout with dropout before each residual sum."""

from typing import Any

import torch

from .attention import AttentionPieces, attend, merge_heads, rotated, split_heads
from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
    return hidden_states + layer.resid_attn_dropout(attended)


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.resid_mlp_dropout(layer.mlp(layer.post_attention_layernorm(hidden_states)))


def _project(layer: Any, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
    attention = layer.self_attn
    size = attention.head_dim
    widths = [
        attention.config.num_attention_heads * size,
        attention.num_key_value_heads * size,
        attention.num_key_value_heads * size,
    ]
    projected = attention.qkv_proj(layer.input_layernorm(hidden_states)).split(widths, dim=-1)
    queries, keys, values = (split_heads(part, size) for part in projected)
    return *rotated(attention, queries, keys, position_embeddings), values


def _attend(layer: Any, *heads: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attention = layer.self_attn
    kwargs["sliding_window"] = getattr(attention.config, "sliding_window", None)
    return attend(attention, heads, dropout=attention.attention_dropout, scaling=attention.scaling, **kwargs)


def _output(layer: Any, hidden_states: torch.Tensor, attended: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.resid_attn_dropout(layer.self_attn.o_proj(merge_heads(attended)))


register_architecture(
    ArchitectureSpec(
        model_types=("phi3",),
        layers=(
            LayerSpec(
                layer_class="Phi3DecoderLayer",
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
        dropout=lambda config: config.resid_pdrop,
    )
)
