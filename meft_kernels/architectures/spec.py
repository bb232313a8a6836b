"""What the engine must know about a family of models, and nothing more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Block = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class ArchitectureSpec:
    """Where the layers of a family are, where attention ends and the MLP begins, and where the FFN adapter taps.

    A layer is found by its class *name* inside an ``nn.ModuleList``, so one spec serves the base model, every task head
    and a model wrapped by PEFT. The layer's ``forward`` takes the hidden states first and returns them, bare or first
    in a tuple.
    """

    model_types: tuple[str, ...]
    """Values of ``config.model_type`` that this spec serves."""

    layer_class: str
    """Class name of one layer, e.g. ``"LlamaDecoderLayer"``."""

    attention_block: Block
    """``(layer, hidden_states, **kwargs) -> hidden_states``: the layer up to where its MLP block begins, its residual
    connection and norms included. ``kwargs`` are the layer call's own, by name."""

    mlp_block: Block
    """``(layer, hidden_states, **kwargs) -> hidden_states``: the rest of the layer, so that
    ``mlp_block(attention_block(x))`` equals it bit for bit."""

    ffn_reads: Callable[[Any], nn.Module]
    """The module whose first argument is what the first FFN linear reads."""

    ffn_writes: Callable[[Any], nn.Module]
    """The module whose output is what the second FFN linear gives, before residual and norm."""

    activation: Callable[[Any], str]
    """Name of the backbone's activation (a key of transformers' ``ACT2FN``), from the model's config."""

    dropout: Callable[[Any], float]
    """The backbone's hidden dropout probability, from the model's config."""

    head_modules: tuple[str, ...] = ()
    """Children of the base model that only task heads read; they are trained along with a new head."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: a pickled model finds the family that its reader has registered, whatever callables it is made of.
        from .registry import find_architecture

        return find_architecture, (self.model_types[0],)

    def __deepcopy__(self, memo: dict[int, Any]) -> ArchitectureSpec:
        return self
