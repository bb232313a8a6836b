"""What the engine must know about a family of models, and nothing more. README.md beside this file has an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .attention import AttentionPieces

if TYPE_CHECKING:
    from ..config import MeftConfig

Block = Callable[..., Any]


def _pre_norm(config: Any) -> bool:
    return False


def _in_turn(config: Any) -> bool:
    return True


def _no_layerdrop(config: Any) -> float:
    return 0.0


def _hidden_size(config: Any) -> int:
    return int(config.hidden_size)


def _no_dropout(config: Any) -> float:
    return 0.0


def _no_objection(config: Any, settings: MeftConfig) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One kind of layer: how to recognise it, where attention ends and the MLP begins, where the FFN adapter taps.

    Layers are found by their class *name* inside an ``nn.ModuleList``, so one spec serves the base model, every task
    head and a model wrapped by PEFT. A layer's ``forward`` takes the hidden states first and returns them, bare or
    first in a tuple.
    """

    layer_class: str | tuple[str, ...]
    """Class name of the layer, e.g. ``"LlamaDecoderLayer"``; several if families differ in nothing else. A subclass
    counts as its base."""

    attention_block: Block
    """``(layer, hidden_states, **kwargs) -> hidden_states``: the layer up to where its MLP block begins, its residual
    connection and norms included. ``kwargs`` are the layer call's own, by name. Whatever else the layer returns (a
    position bias for the next layer, say) is returned here too, ``(hidden_states, ...)``."""

    mlp_block: Block
    """``(layer, hidden_states, **kwargs) -> hidden_states``: the rest of the layer, so that
    ``mlp_block(attention_block(x))`` equals it bit for bit."""

    ffn_reads: Callable[[Any], nn.Module]
    """``layer -> module`` whose first argument is what the first FFN linear reads."""

    ffn_writes: Callable[[Any], nn.Module]
    """``layer -> module`` whose output is what the second FFN linear gives, before residual and norm."""

    post_norm: Callable[[Any], bool] = _pre_norm
    """Whether, by the model's config, the layer ends in a norm of all its output, so that no residual stream goes
    through it. Decides the read-out."""

    in_turn: Callable[[Any], bool] = _in_turn
    """Whether, by the model's config, the MLP block reads what the attention block gives, so that the two blocks make
    up the layer. Where both read the layer's input, the MLP cannot be computed tile by tile after attention."""

    attention_pieces: AttentionPieces | None = None
    """The attention block in pieces, where the family's can be cut so."""

    layerdrop: Callable[[Any], float] = _no_layerdrop
    """The probability, from the model's config, with which its forward leaves out such a layer in training."""
    hidden_size: Callable[[Any], int] | None = None
    """Width of these layers' hidden states, from the model's config, where it is not the family's."""
    read_between: bool = False
    """Whether the model reads what layers return elsewhere than in the next: each then hands on its read-out."""
    blocks_compile: bool = True
    """Whether ``torch.compile`` can make one graph of a block for all layers."""
    boxes: tuple[str, ...] = ()
    """Arguments, mappings, by which layers hand tensors to later ones (keys and values that they share)."""

    def __post_init__(self) -> None:
        _check_callables(
            self, "attention_block", "mlp_block", "ffn_reads", "ffn_writes", "post_norm", "in_turn", "layerdrop"
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        return (self.layer_class,) if isinstance(self.layer_class, str) else self.layer_class

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is such a layer."""
        return any(cls.__name__ in self.class_names for cls in type(module).__mro__)

    def serves(self, name: str, layers: nn.ModuleList) -> bool:
        """Whether a model's list of this name is one of such layers."""
        return all(self.matches(layer) for layer in layers)


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec:
    """A family of models: its kinds of layers, and what of its config the adapters follow."""

    model_types: tuple[str, ...]
    """Values of ``config.model_type`` that this spec serves."""
    layers: tuple[LayerSpec, ...]
    """Every kind of layer: one for most, two for encoder and decoder."""
    activation: Callable[[Any], str]
    """Name of the backbone's activation (a key of transformers' ``ACT2FN``), from the model's config."""
    dropout: Callable[[Any], float] = _no_dropout
    """The backbone's hidden dropout probability, from the model's config."""
    hidden_size: Callable[[Any], int] = _hidden_size
    """Width of the hidden states, from the model's config."""

    head_modules: tuple[str, ...] = ()
    """Children of the base model that only task heads read; they are trained along with a new head."""

    extra_heads: tuple[str, ...] = ()
    """Children of a whole model that are new heads where its structure does not show it: a head on a model that has no
    base model inside, or one that sits beside a language-model head."""

    objection: Callable[[Any, MeftConfig], str | None] = _no_objection
    """``(model's config, settings) -> reason`` why this model cannot be patched with these settings, and what to do
    instead; None if it can."""

    notes: str = ""
    """What a user of the family must know, for the table of supported models."""

    def __post_init__(self) -> None:
        for name, kind in (("model_types", str), ("layers", LayerSpec)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or not all(isinstance(value, kind) for value in values):
                raise TypeError(f"{name} must be a tuple of at least one {kind.__name__}, got {values!r}")
        _check_callables(self, "activation", "dropout", "hidden_size", "objection")


def _check_callables(spec: Any, *names: str) -> None:
    for name in names:
        if not callable(getattr(spec, name)):
            raise TypeError(f"{name} must be a function, see {type(spec).__name__}; got {getattr(spec, name)!r}")
