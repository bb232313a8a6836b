"""OPT: a decoder with pre-norm layers, post-norm ones in OPT-350m; layers may be left out at random (LayerDrop)."""

from typing import Any

import torch
from torch.nn.functional import dropout

from .attention import AttentionPieces, attend, merge_heads, split_heads
from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _attention_block(
    layer: Any, hidden_states: torch.Tensor, use_cache: bool | None = None, **kwargs: Any
) -> torch.Tensor:
    residual = hidden_states
    if layer.do_layer_norm_before:
        hidden_states = layer.self_attn_layer_norm(hidden_states)
    attended = layer.self_attn(hidden_states=hidden_states, **kwargs)[0]
    hidden_states = residual + dropout(attended, p=layer.dropout, training=layer.training)
    return hidden_states if layer.do_layer_norm_before else layer.self_attn_layer_norm(hidden_states)


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    shape = hidden_states.shape
    residual = hidden_states = hidden_states.reshape(-1, shape[-1])
    if layer.do_layer_norm_before:
        hidden_states = layer.final_layer_norm(hidden_states)
    written = layer.fc2(layer.activation_fn(layer.fc1(hidden_states)))
    hidden_states = (residual + dropout(written, p=layer.dropout, training=layer.training)).view(shape)
    return hidden_states if layer.do_layer_norm_before else layer.final_layer_norm(hidden_states)


def _project(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    attention = layer.self_attn
    x = layer.self_attn_layer_norm(hidden_states) if layer.do_layer_norm_before else hidden_states
    projected = attention.q_proj(x) * attention.scaling, attention.k_proj(x), attention.v_proj(x)
    return tuple(split_heads(part, attention.head_dim) for part in projected)


def _attend(layer: Any, *heads: torch.Tensor, output_attentions: Any = None, **kwargs: Any) -> torch.Tensor:
    return attend(layer.self_attn, heads, dropout=layer.self_attn.dropout, scaling=1.0, **kwargs)


def _output(layer: Any, hidden_states: torch.Tensor, attended: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn.out_proj(merge_heads(attended))
    hidden_states = hidden_states + dropout(attended, p=layer.dropout, training=layer.training)
    return hidden_states if layer.do_layer_norm_before else layer.self_attn_layer_norm(hidden_states)


register_architecture(
    ArchitectureSpec(
        model_types=("opt",),
        layers=(
            LayerSpec(
                layer_class="OPTDecoderLayer",
                attention_block=_attention_block,
                mlp_block=_mlp_block,
                attention_pieces=AttentionPieces(
                    project=_project,
                    attend=_attend,
                    output=_output,
                    replaces=lambda layer: (layer.self_attn,),
                ),
                ffn_reads=lambda layer: layer.fc1,
                ffn_writes=lambda layer: layer.fc2,
                post_norm=lambda config: not config.do_layer_norm_before,
                layerdrop=lambda config: config.layerdrop,
            ),
        ),
        activation=lambda config: config.activation_function,
        dropout=lambda config: config.dropout,
        notes="pre-norm and post-norm (350m), LayerDrop",
    )
)
