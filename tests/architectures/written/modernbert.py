"""ModernBERT: a pre-norm encoder with a gated MLP, local and global attention by turns."""

from typing import Any

import torch

from meft_kernels import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.attn(layer.attn_norm(hidden_states), **kwargs)[0]


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return hidden_states + layer.mlp(layer.mlp_norm(hidden_states))


SPEC = ArchitectureSpec(
    model_types=("modernbert",),
    layers=(
        LayerSpec(
            layer_class="ModernBertEncoderLayer",
            attention_block=_attention_block,
            mlp_block=_mlp_block,
            ffn_reads=lambda layer: layer.mlp,
            ffn_writes=lambda layer: layer.mlp,
        ),
    ),
    activation=lambda config: config.hidden_activation,
    dropout=lambda config: config.mlp_dropout,
)
