"""GPT-NeoX and Pythia: decoders whose MLP reads the layer's input beside attention, or attention's output after it."""

from typing import Any

import torch

from meft_kernels import ArchitectureSpec, LayerSpec, MeftConfig


def _attention_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended = layer.attention(layer.input_layernorm(hidden_states), **kwargs)[0]
    return layer.post_attention_dropout(attended) + hidden_states


def _mlp_block(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return layer.post_mlp_dropout(layer.mlp(layer.post_attention_layernorm(hidden_states))) + hidden_states


def _objection(config: Any, settings: MeftConfig) -> str | None:
    if config.use_parallel_residual and settings.variant == "meft3":
        return (
            "meft3 couples the MLP block after the attention block, and in this model "
            "(use_parallel_residual=True) both read the layer's input: pass variant='meft1' or 'meft2'"
        )
    return None


SPEC = ArchitectureSpec(
    model_types=("gpt_neox",),
    layers=(
        LayerSpec(
            layer_class="GPTNeoXLayer",
            attention_block=_attention_block,
            mlp_block=_mlp_block,
            ffn_reads=lambda layer: layer.mlp,
            ffn_writes=lambda layer: layer.mlp,
            in_turn=lambda config: not config.use_parallel_residual,
        ),
    ),
    activation=lambda config: config.hidden_act,
    dropout=lambda config: config.hidden_dropout,
    objection=_objection,
    notes="Pythia is one; meft3 only where use_parallel_residual is off",
)
