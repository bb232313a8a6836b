"""DistilBERT: BERT's layer under names of its own."""

from typing import Any

import torch

from meft_kernels import ArchitectureSpec, LayerSpec


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.attention(hidden_states, **kwargs)[0]
    return layer.sa_layer_norm(attended + hidden_states)


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return layer.output_layer_norm(layer.ffn(hidden_states) + hidden_states)


SPEC = ArchitectureSpec(
    model_types=("distilbert",),
    layers=(
        LayerSpec(
            layer_class="TransformerBlock",
            attention_block=_attention_block,
            mlp_block=_mlp_block,
            ffn_reads=lambda layer: layer.ffn.lin1,
            ffn_writes=lambda layer: layer.ffn.lin2,
            post_norm=lambda config: True,
        ),
    ),
    activation=lambda config: config.activation,
    dropout=lambda config: config.dropout,
)
