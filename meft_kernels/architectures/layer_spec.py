"""What the engine must know about one kind of a family's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..modules import owner_of
from .attention import AttentionPieces

Block = Callable[..., Any]


def _pre_norm(config: Any) -> bool:
    return False


def _in_turn(config: Any) -> bool:
    return True


def _no_layerdrop(config: Any) -> float:
    return 0.0


def _unbroken(config: Any) -> Sequence[int]:
    return ()


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
    activation: Callable[[Any], str] | None = None
    """Name of their activation, from the model's config, where it is not the family's."""
    dropout: Callable[[Any], float] | None = None
    """Their hidden dropout probability, likewise."""
    read_between: bool = False
    """Whether the model reads what layers return elsewhere than in the next: each then hands on its read-out."""
    blocks_compile: bool = True
    """Whether ``torch.compile`` can make one graph of a block for all layers."""
    boxes: tuple[str, ...] = ()
    """Arguments, mappings, by which layers hand tensors to later ones (keys and values that they share)."""
    begins: Callable[[Any], Sequence[int]] = _unbroken
    """Indices, from the model's config, of layers, not the first, below which the model's own code may change hidden
    states (images injected there, say): streams are read out before them and begin anew."""

    def __post_init__(self) -> None:
        check_callables(
            self,
            "attention_block",
            "mlp_block",
            "ffn_reads",
            "ffn_writes",
            "post_norm",
            "in_turn",
            "layerdrop",
            "begins",
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

    def calls(self, layers: Sequence[nn.Module]) -> tuple[int, ...]:
        """Indices of the layers of such a list that one pass calls, in turn."""
        return tuple(range(len(layers)))

    def owner(self, model: nn.Module, name: str) -> nn.Module:
        """The model inside ``model`` whose forward calls the layers of the list of this name."""
        return owner_of(model, name)


def check_callables(spec: Any, *names: str) -> None:
    """Raise TypeError where one of these fields is no function."""
    for name in names:
        if not callable(getattr(spec, name)):
            raise TypeError(f"{name} must be a function, see {type(spec).__name__}; got {getattr(spec, name)!r}")
