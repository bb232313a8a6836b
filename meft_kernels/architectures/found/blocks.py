"""A layer taken apart without its code: the layer with its FFN left out, and the layer with all before that left out.

Where it is ``h = x + A(x); y = h + M(h)``, a part left out gives zeros. Where a part adds the residual itself (BERT's
output, T5's sublayers), it gives that back as it came. Whether the two are the layer, its own numbers tell.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .trace import Call, first_tensor

Kind = tuple[str, tuple[str, ...]]
"""A layer's class name and the names of its children: what tells kinds of layers in one list apart."""


def kind_of(layer: nn.Module) -> Kind:
    """The kind of a layer as the model has it, nothing inserted."""
    return type(layer).__name__, tuple(layer._modules)


@dataclass(frozen=True)
class ByKind:
    """Something for every kind of layer in a list."""

    values: dict[Kind, Any]

    def of(self, layer: nn.Module) -> Any:
        """That of the layer's kind: adapters may have been inserted into it since."""
        fitting = [
            kind for kind in self.values if kind[0] == type(layer).__name__ and set(kind[1]) <= layer._modules.keys()
        ]
        if not fitting:
            raise TypeError(f"{type(layer).__name__} has none of the parts that it had when the model was looked at")
        return self.values[max(fitting, key=lambda kind: len(kind[1]))]


@dataclass(frozen=True)
class LeftOut:
    """Stands in for a part's forward: gives zeros of the hidden states' shape, or the hidden states as they came."""

    name: str
    gives: Literal["zeros", "residual"]
    outputs: int | None
    """How many things the part returns, None where it returns hidden states bare."""
    width: int
    last: bool = False
    """Whether the residual is the last tensor it is given, and not the first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        hidden_states = tensors[-1 if self.last else 0]
        if self.gives == "zeros":
            hidden_states = hidden_states.new_zeros(*hidden_states.shape[:-1], self.width)
        return hidden_states if self.outputs is None else (hidden_states, *[None] * (self.outputs - 1))


def without(layer: nn.Module, parts: tuple[LeftOut, ...]) -> nn.Module:
    """The layer with other forwards of some of its children; what was given is not touched, and shares all tensors."""
    other = _shallow(layer)
    other.__dict__.pop("forward", None)
    other.__dict__["_modules"] = children = dict(layer._modules)
    for part in parts:
        child = children[part.name]
        assert child is not None
        stand_in = _shallow(child)
        # Nobody's hooks: neither adapters nor what is recorded of a part belongs to one that is left out.
        stand_in.__dict__.update(forward=part, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        children[part.name] = stand_in
    return other


def _shallow(module: nn.Module) -> nn.Module:
    other = type(module).__new__(type(module))
    other.__dict__.update(module.__dict__)
    return other


@dataclass(frozen=True)
class Without:
    """A block: the layer with parts left out, by its kind."""

    parts: ByKind
    bare: bool
    """Whether to return hidden states alone."""

    def __call__(self, layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        output = type(layer).forward(without(layer, self.parts.of(layer)), hidden_states, **kwargs)
        return first_tensor(output) if self.bare else output


@dataclass(frozen=True)
class Whole:
    """In the place of a block of layers that cannot be taken apart."""

    def __call__(self, layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        raise TypeError(f"{type(layer).__name__} was not found to be an attention block and then an MLP block")


def cuts(parts: list[Call], ffn: str, layer: Call) -> list[tuple[tuple[LeftOut, ...], tuple[LeftOut, ...]]]:
    """Ways to take a layer apart, likeliest first: what its attention block leaves out, and what its MLP block does.

    Args:
        parts: calls of its modules, in time.
        ffn: path of the module that the FFN writes.
        layer: its own call.
    """
    assert layer.given is not None
    shape = layer.given.shape
    direct = [part for part in parts if "." not in part.name]
    end = next((part for part in direct if part.name == ffn.partition(".")[0]), None)
    if end is None or end.returned is None or end.returned.shape != shape:
        return []
    before = [part for part in direct if part.end < end.start and part.returned is not None]
    mixers = [p for p in before if p.given is not None and p.given.shape == shape and _mixes(p, shape)]
    if not mixers or len({part.name for part in mixers}) < len(mixers):
        return []
    width = shape[-1]

    def left_out(part: Call, gives: Literal["zeros", "residual"], last: bool = False) -> LeftOut:
        outputs = len(part.output) if isinstance(part.output, tuple) else None
        return LeftOut(part.name, gives, outputs, width, last)

    return [
        ((left_out(end, "zeros"),), tuple(left_out(part, "zeros") for part in mixers)),
        ((left_out(end, "residual", last=True),), tuple(left_out(part, "residual") for part in mixers)),
    ]


def _mixes(part: Call, shape: torch.Size) -> bool:
    from .taps import is_norm

    keeps = part.returned is not None and part.returned.shape == shape
    return keeps and not is_norm(part.module) and next(part.module.parameters(), None) is not None
