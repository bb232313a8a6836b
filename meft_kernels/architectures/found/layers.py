"""What is known of the layers of one list, as they were found in a model or taken from an adapter's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..spec import LayerSpec
from .blocks import ByKind, Kind, Whole, Without
from .taps import Tap


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

    @classmethod
    def of(
        cls,
        taps: dict[Kind, Tap],
        attention: dict[Kind, Any],
        mlp: dict[Kind, Any],
        *,
        apart: bool,
        constants: dict[str, Any],
        **others: Any,
    ) -> FoundLayers:
        """From what is known of each kind of layer.

        Args:
            taps: the FFN; of one that was not found both ends are "".
            attention, mlp: what the blocks leave out; of no account unless ``apart``.
            apart: see above.
            constants: fields that are functions of a config, by what they give whatever that is.
            **others: all other fields.
        """
        others |= {name: Constant(value) for name, value in constants.items()}
        return cls(
            attention_block=Without(ByKind(attention), bare=False) if apart else Whole(),
            mlp_block=Without(ByKind(mlp), bare=True) if apart else Whole(),
            ffn_reads=TapOf(ByKind(taps), 0),
            ffn_writes=TapOf(ByKind(taps), 1),
            in_turn=Constant(apart),
            blocks_compile=False,
            tapped=all(tap.writes != "" for tap in taps.values()),
            apart=apart,
            **others,
        )

    def serves(self, name: str, layers: nn.ModuleList) -> bool:
        """Whether these are the layers that were looked at."""
        return name == self.list_name

    def calls(self, layers: Sequence[nn.Module]) -> tuple[int, ...]:
        return self.order

    def owner(self, model: nn.Module, name: str) -> nn.Module:
        return model.get_submodule(self.owner_name)
