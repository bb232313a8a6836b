"""OPT: a decoder with pre-norm layers, post-norm ones in OPT-350m; layers may be left out at random (LayerDrop)."""

from typing import Any

import torch
from torch.nn.functional import dropout

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


register_architecture(
    ArchitectureSpec(
        model_types=("opt",),
        layers=(
            LayerSpec(
                layer_class="OPTDecoderLayer",
                attention_block=_attention_block,
                mlp_block=_mlp_block,
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
