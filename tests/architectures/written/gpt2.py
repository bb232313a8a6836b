"""GPT-2: a pre-norm decoder, also with cross-attention."""

from typing import Any

import torch

from meft_kernels import ArchitectureSpec, LayerSpec


def _attention_block(
    layer: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    attended = layer.attn(layer.ln_1(hidden_states), attention_mask=attention_mask, **kwargs)[0]
    hidden_states = attended + hidden_states
    if encoder_hidden_states is None:
        return hidden_states
    attended = layer.crossattention(
        layer.ln_cross_attn(hidden_states),
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
        attention_mask=attention_mask,
        **{name: cache for name, cache in kwargs.items() if name in ("cache", "past_key_values")},
    )[0]
    return hidden_states + attended


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.mlp(layer.ln_2(hidden_states))


SPEC = ArchitectureSpec(
    model_types=("gpt2",),
    layers=(
        LayerSpec(
            layer_class="GPT2Block",
            attention_block=_attention_block,
            mlp_block=_mlp_block,
            ffn_reads=lambda layer: layer.mlp,
            ffn_writes=lambda layer: layer.mlp.c_proj,
        ),
    ),
    activation=lambda config: config.activation_function,
    dropout=lambda config: config.resid_pdrop,
    extra_heads=("multiple_choice_head",),
)
