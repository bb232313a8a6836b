"""DeBERTa-v2 and -v3: a post-norm encoder whose attention also reads embeddings of relative positions."""

from typing import Any

import torch

from meft_kernels import ArchitectureSpec, LayerSpec, MeftConfig


def _attention_block(
    layer: Any, hidden_states: torch.Tensor, output_attentions: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden_states, weights = layer.attention(hidden_states, output_attentions=output_attentions, **kwargs)
    return hidden_states, weights if output_attentions else None


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return layer.output(layer.intermediate(hidden_states), hidden_states)


def _objection(config: Any, settings: MeftConfig) -> str | None:
    if getattr(config, "conv_kernel_size", 0) > 0 and settings.frozen_layers == 0:
        return (
            "its encoder adds a convolution to what the first layer gives, which the inverse cannot know: pass "
            "frozen_layers=1 or more"
        )
    return None


SPEC = ArchitectureSpec(
    model_types=("deberta-v2",),
    layers=(
        LayerSpec(
            layer_class="DebertaV2Layer",
            attention_block=_attention_block,
            mlp_block=_mlp_block,
            ffn_reads=lambda layer: layer.intermediate,
            ffn_writes=lambda layer: layer.output.dense,
            post_norm=lambda config: True,
        ),
    ),
    activation=lambda config: config.hidden_act,
    dropout=lambda config: config.hidden_dropout_prob,
    objection=_objection,
    notes="DeBERTa-v3 too; its encoder holds every layer's output until forward ends; with a convolution "
    "(v2-xlarge) frozen_layers=1 or more",
)
