"""ViT and DeiT: pre-norm encoders of image patches."""

from typing import Any

import torch

from meft_kernels import ArchitectureSpec, LayerSpec


def _attention_block(
    layer: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    attended = layer.attention(layer.layernorm_before(hidden_states), attention_mask, **kwargs)[0]
    return layer.dropout(attended) + hidden_states


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return layer.dropout(layer.mlp(layer.layernorm_after(hidden_states))) + hidden_states


SPEC = ArchitectureSpec(
    model_types=("vit", "deit"),
    layers=(
        LayerSpec(
            layer_class=("ViTLayer", "DeiTLayer"),
            attention_block=_attention_block,
            mlp_block=_mlp_block,
            ffn_reads=lambda layer: layer.mlp,
            ffn_writes=lambda layer: layer.mlp,
        ),
    ),
    activation=lambda config: config.hidden_act,
    dropout=lambda config: config.hidden_dropout_prob,
    head_modules=("pooler",),
)
