"""T5: pre-norm encoder and decoder; the first layer of each makes the position biases that the others are handed."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .registry import register_architecture
from .spec import ArchitectureSpec, LayerSpec


def _clamped(hidden_states: torch.Tensor) -> torch.Tensor:
    """What the layer does after each of its parts: in float16, infinities become large numbers."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    largest = torch.finfo(torch.float16).max
    bound = torch.where(torch.isinf(hidden_states).any(), largest - 1000, largest)
    return torch.clamp(hidden_states, min=-bound, max=bound)


@functools.cache
def _returns_weights(forward: Callable[..., Any]) -> bool:
    """Whether the layer returns attention weights too, after each bias, if asked for: older transformers do."""
    return "output_attentions" in inspect.signature(forward).parameters


def _attention_block(
    layer: Any,
    hidden_states: torch.Tensor,
    position_bias: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    encoder_decoder_position_bias: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    hidden_states, *own = layer.layer[0](
        hidden_states, attention_mask=attention_mask, position_bias=position_bias, **kwargs
    )
    hidden_states = _clamped(hidden_states)
    cross: list[Any] = []
    if layer.is_decoder and encoder_hidden_states is not None:
        hidden_states, *cross = layer.layer[1](
            hidden_states,
            key_value_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            position_bias=encoder_decoder_position_bias,
            **kwargs,
        )
        hidden_states = _clamped(hidden_states)
    if _returns_weights(type(layer).forward):
        return hidden_states, *own, *cross
    return hidden_states, own[0], cross[0] if cross else None


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return _clamped(layer.layer[-1](hidden_states))


register_architecture(
    ArchitectureSpec(
        model_types=("t5",),
        layers=(
            LayerSpec(
                layer_class="T5Block",
                attention_block=_attention_block,
                mlp_block=_mlp_block,
                ffn_reads=lambda layer: layer.layer[-1].DenseReluDense,
                ffn_writes=lambda layer: layer.layer[-1].DenseReluDense,
            ),
        ),
        activation=lambda config: config.dense_act_fn,
        dropout=lambda config: config.dropout_rate,
        extra_heads=("qa_outputs",),
        notes="encoder, decoder or both; v1.1 and Flan too",
    )
)
