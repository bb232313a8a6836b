"""A layer taken apart without its code: the layer without its FFN, and the layer without what comes before that.

Where it is ``h = x + A(x); y = h + M(h)``, a part left out gives zeros. Where a norm of the sum follows, that is left
out too. Where a part adds the residual itself (BERT's output), it gives that back. Whether the two blocks are the
layer, its own numbers tell.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .nothing import Nothing
from .taps import Tap, is_norm
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
        if len(self.values) == 1:
            return next(iter(self.values.values()))
        fitting = [
            kind for kind in self.values if kind[0] == type(layer).__name__ and set(kind[1]) <= layer._modules.keys()
        ]
        if not fitting:
            raise TypeError(f"{type(layer).__name__} has none of the parts that it had when the model was looked at")
        return self.values[max(fitting, key=lambda kind: len(kind[1]))]


@dataclass(frozen=True)
class LeftOut:
    """Stands in for a part's forward: gives zeros in the shape of what the part gives, or the residual as it came."""

    path: str
    residual: int | None
    """Which of the tensors that the part is given is the residual; None for zeros."""
    outputs: int | None
    """How many things the part returns, None where it returns hidden states bare."""
    width: int
    flat: bool
    """Whether the part gives rows without the batch's shape."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = _tensors(args, kwargs)
        hidden_states = tensors[self.residual or 0]
        if self.residual is None:
            rows = hidden_states.shape[:-1]
            shape = (rows.numel(),) if self.flat else tuple(rows)
            hidden_states = Nothing.like(hidden_states, (*shape, self.width))
        return hidden_states if self.outputs is None else (hidden_states, *[None] * (self.outputs - 1))


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def without(layer: nn.Module, parts: tuple[LeftOut, ...]) -> nn.Module:
    """The layer with other forwards of some of its children; what was given is not touched, and shares all tensors."""
    other = _shallow(layer)
    other.__dict__.pop("forward", None)
    for part in parts:
        *above, name = part.path.split(".")
        place = other
        for step in above:
            place._modules[step] = place = _shallow(place.get_submodule(step))
        # Nobody's hooks: neither adapters nor what is recorded of a part belongs to one that is left out.
        stand_in = _shallow(place.get_submodule(name))
        stand_in.__dict__.update(forward=part, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        place._modules[name] = stand_in
    return other


def _shallow(module: nn.Module) -> nn.Module:
    """The same module, with a list of children of its own."""
    other = type(module).__new__(type(module))
    other.__dict__.update(module.__dict__, _modules=dict(module._modules))
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


Cut = tuple[tuple[LeftOut, ...], tuple[LeftOut, ...]]
"""What a layer's attention block leaves out, and what its MLP block does."""


def cuts(parts: list[Call], tap: Tap, layer: Call, *, post_norm: bool) -> list[Cut]:
    """Ways to take a layer apart, likeliest first.

    Args:
        parts: calls of its modules, in time.
        tap: its FFN.
        layer: its own call.
        post_norm: whether the layer ends in a norm of all its output.
    """
    assert layer.given is not None
    shape = layer.given.shape
    direct = [part for part in _outermost(parts) if _has_weights(part) and _gives(part, shape)]
    end = next((part for part in direct if f"{tap.writes}.".startswith(f"{part.name}.")), None)
    weighty = [part for part in direct if not is_norm(part.module)]
    if end is None or end not in weighty or len({part.name for part in direct}) < len(direct):
        return []
    ffns = [part for part in weighty if part.start >= end.start]
    mixers = [part for part in weighty if part.end < end.start and part.given is not None and part.given.shape == shape]
    if not mixers:
        return []
    norms = [part for part in direct if is_norm(part.module)]
    after = [part for part in norms if part.start > end.end]
    between = [part for part in norms if part.end < end.start and part.start > mixers[0].start]
    opening = _opening(parts, tap, end)
    heads = [
        None if left_out is None else (*opening, *left_out)
        for left_out in (
            _left_out(ffns, None, shape),
            _left_out(ffns, None, shape, after),
            _left_out(ffns, mixers[-1].returned, shape),
        )
    ]
    tails = [
        _left_out(mixers, None, shape),
        _left_out(mixers, None, shape, between),
        _left_out(mixers, layer.entered, shape),
    ]
    # A part that is given the residual adds it itself; else it is the norm of the sum that a post-norm layer ends in.
    order = (2, 1, 0) if post_norm else (2, 0, 1)
    ways = [(heads[i], tails[j]) for i in order for j in order]
    return list(dict.fromkeys((head, tail) for head, tail in ways if head is not None and tail is not None))


def _opening(parts: list[Call], tap: Tap, end: Call) -> tuple[LeftOut, ...]:
    """The part with the FFN's first linear, where it is another than ``end``, with the last: wide, and for nothing."""
    first = next((part for part in _outermost(parts) if f"{tap.reads}.".startswith(f"{part.name}.")), None)
    if first is None or first.start >= end.start or first.given is None or first.returned is None:
        return ()
    flat = first.returned.dim() < first.given.dim()
    return (LeftOut(first.name, None, None, first.returned.shape[-1], flat),)


def _outermost(parts: list[Call]) -> list[Call]:
    """The parts that the layer calls itself; they may be in a list."""
    names = {part.name for part in parts}
    inside = {name for name in names if any(name[:at] in names for at, char in enumerate(name) if char == ".")}
    return [part for part in parts if part.name not in inside]


def _gives(part: Call, shape: torch.Size) -> bool:
    """Whether it gives hidden states, of the batch's shape or of all rows."""
    returned = part.returned
    return returned is not None and returned.shape[-1:] == shape[-1:] and returned.numel() == shape.numel()


def _left_out(
    parts: list[Call], residual: torch.Tensor | None, shape: torch.Size, norms: list[Call] | None = None
) -> tuple[LeftOut, ...] | None:
    """The parts giving zeros, or each the residual that it is given; norms, what they are given.

    None where a part is not given the residual.
    """
    found = []
    for part in [*parts, *(norms or [])]:
        outputs = len(part.output) if isinstance(part.output, tuple) else None
        at: int | None = 0 if norms and part in norms else None
        if residual is not None:
            tensors = _tensors(part.args, part.kwargs)
            at = next((i for i, one in enumerate(tensors) if _is_same(one, residual)), None)
            if at is None:
                return None
            residual = part.returned
            assert residual is not None
        flat = part.returned is not None and part.returned.shape != shape
        found.append(LeftOut(part.name, at, outputs, shape[-1], flat))
    return tuple(found)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()


def _has_weights(part: Call) -> bool:
    return next(part.module.parameters(), None) is not None
