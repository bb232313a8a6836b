"""OLMo-2: a decoder that norms what attention and MLP give, not what they read."""

from typing import Any

import torch

from .attention import AttentionPieces, attend, merge_heads, rotated, split_heads
from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=hidden_states, **kwargs)[0]
    return hidden_states + layer.post_attention_layernorm(attended)


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.post_feedforward_layernorm(layer.mlp(hidden_states))


def _project(layer: Any, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
    attention = layer.self_attn
    queries = attention.q_norm(attention.q_proj(hidden_states))
    keys = attention.k_norm(attention.k_proj(hidden_states))
    values = attention.v_proj(hidden_states)
    queries, keys, values = (split_heads(part, attention.head_dim) for part in (queries, keys, values))
    return *rotated(attention, queries, keys, position_embeddings), values


def _attend(layer: Any, *heads: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attention = layer.self_attn
    return attend(attention, heads, dropout=attention.attention_dropout, scaling=attention.scaling, **kwargs)


def _output(layer: Any, hidden_states: torch.Tensor, attended: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.post_attention_layernorm(layer.self_attn.o_proj(merge_heads(attended)))


register_architecture(
    ArchitectureSpec(
        model_types=("olmo2",),
        layers=(
            LayerSpec(
                layer_class="Olmo2DecoderLayer",
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
