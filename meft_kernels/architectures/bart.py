"""BART: post-norm encoder and decoder, with cross-attention; layers may be left out at random (LayerDrop)."""

from typing import Any

import torch
from torch.nn.functional import dropout

from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _residual(layer: Any, hidden_states: torch.Tensor, update: torch.Tensor, norm: Any) -> torch.Tensor:
    return norm(hidden_states + dropout(update, p=layer.dropout, training=layer.training))


def _encoder_attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.self_attn(hidden_states, **kwargs)[0]
    return _residual(layer, hidden_states, attended, layer.self_attn_layer_norm)


def _decoder_attention_block(
    layer: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    attended = layer.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)[0]
    hidden_states = _residual(layer, hidden_states, attended, layer.self_attn_layer_norm)
    if encoder_hidden_states is None:
        return hidden_states
    attended = layer.encoder_attn(
        hidden_states, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **kwargs
    )[0]
    return _residual(layer, hidden_states, attended, layer.encoder_attn_layer_norm)


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    inner = layer.activation_fn(layer.fc1(hidden_states))
    inner = dropout(inner, p=layer.activation_dropout, training=layer.training)
    return _residual(layer, hidden_states, layer.fc2(inner), layer.final_layer_norm)


def _encoder_mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    hidden_states = _mlp_block(layer, hidden_states)
    if hidden_states.dtype == torch.float16 and not torch.isfinite(hidden_states).all():
        bound = torch.finfo(torch.float16).max - 1000
        hidden_states = hidden_states.clamp(-bound, bound)
    return hidden_states


register_architecture(
    ArchitectureSpec(
        model_types=("bart",),
        layers=(
            LayerSpec(
                layer_class="BartEncoderLayer",
                attention_block=_encoder_attention_block,
                mlp_block=_encoder_mlp_block,
                ffn_reads=lambda layer: layer.fc1,
                ffn_writes=lambda layer: layer.fc2,
                post_norm=lambda config: True,
                layerdrop=lambda config: config.encoder_layerdrop,
            ),
            LayerSpec(
                layer_class="BartDecoderLayer",
                attention_block=_decoder_attention_block,
                mlp_block=_mlp_block,
                ffn_reads=lambda layer: layer.fc1,
                ffn_writes=lambda layer: layer.fc2,
                post_norm=lambda config: True,
                layerdrop=lambda config: config.decoder_layerdrop,
            ),
        ),
        activation=lambda config: config.activation_function,
        dropout=lambda config: config.dropout,
        notes="encoder, decoder or both, LayerDrop",
    )
)
