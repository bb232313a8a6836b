"""What is known of the layers of one list, as they were found in a model or taken from an adapter's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..spec import LayerSpec
from .blocks import ByKind


@dataclass(frozen=True)
class TapOf:
    """``layer -> module``: one end of the FFN, by the layer's kind."""

    taps: ByKind
    end: int

    def __call__(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.taps.of(layer)[self.end])


@dataclass(frozen=True)
class Constant:
    """A function of a config that does not look at it: the model was."""

    value: Any

    def __call__(self, config: Any) -> Any:
        return self.value


@dataclass(frozen=True, kw_only=True)
class FoundLayers(LayerSpec):
    """The layers of one list, as they were found. All that is in it can be pickled, for it is registered nowhere."""

    hidden_size: Callable[[Any], int]
    list_name: str
    tapped: bool
    """Whether every layer has an FFN that was found."""
    apart: bool
    """Whether every layer is its attention block and then its MLP block."""
    order: tuple[int, ...]
    """Indices of the layers that a pass calls, in turn."""
    owner_name: str
    """Of the model whose forward calls them."""

    def serves(self, name: str, layers: nn.ModuleList) -> bool:
        """Whether these are the layers that were looked at."""
        return name == self.list_name

    def calls(self, layers: Sequence[nn.Module]) -> tuple[int, ...]:
        return self.order

    def owner(self, model: nn.Module, name: str) -> nn.Module:
        return model.get_submodule(self.owner_name)
