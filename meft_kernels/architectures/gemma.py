"""Gemma 2 and Gemma 3 (text): four norms, one before and one after each of attention and MLP."""

from typing import Any

import torch

from .attention import AttentionPieces, attend, merge_heads, rotated, split_heads
from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
    return hidden_states + layer.post_attention_layernorm(attended)


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    written = layer.mlp(layer.pre_feedforward_layernorm(hidden_states))
    return hidden_states + layer.post_feedforward_layernorm(written)


def _project(layer: Any, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
    attention = layer.self_attn
    x = layer.input_layernorm(hidden_states)
    projected = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    queries, keys, values = (split_heads(part, attention.head_dim) for part in projected)
    if hasattr(attention, "q_norm"):  # Gemma 3
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    return *rotated(attention, queries, keys, position_embeddings), values


def _attend(layer: Any, *heads: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attention = layer.self_attn
    kwargs["sliding_window"] = attention.sliding_window
    if type(layer).__name__.startswith("Gemma2"):
        kwargs["softcap"] = attention.attn_logit_softcapping
    return attend(attention, heads, dropout=attention.attention_dropout, scaling=attention.scaling, **kwargs)


def _output(layer: Any, hidden_states: torch.Tensor, attended: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.post_attention_layernorm(layer.self_attn.o_proj(merge_heads(attended)))


register_architecture(
    ArchitectureSpec(
        model_types=("gemma2", "gemma3_text"),
        layers=(
            LayerSpec(
                layer_class=("Gemma2DecoderLayer", "Gemma3DecoderLayer"),
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
        activation=lambda config: config.hidden_activation,
    )
)
