"""A model's lists of layers as its family's spec tells of them, and the runs through each that become stacks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from . import ArchitectureSpec, LayerSpec
from .selection import choose


@dataclass(frozen=True)
class LayerList:
    """One list of a family's layers in a model, with what the family's spec says of them."""

    owner: nn.Module
    """The model whose forward loops over it."""
    name: str
    """Qualified name."""
    layers: list[nn.Module]
    calls: tuple[int, ...]
    """Indices of the layers that a pass calls, in turn."""
    begins: tuple[int, ...]
    """Places among the calls, the first aside, where hidden states are no longer what the call before returned."""
    family: str
    """The name under which the spec is registered."""
    kind: int
    """Which of the spec's kinds of layers they are."""
    spec: LayerSpec
    hidden_size: int
    layerdrop: bool
    post_norm: bool
    in_turn: bool
    under_peft: bool
    """Whether PEFT had been put on the model before."""

    def runs(self, frozen: int) -> list[Run]:
        """What becomes a reversible stack each, where so many layers at the bottom stay as they are."""
        ends = [0, *self.begins, len(self.calls)]
        cut = [tuple(i for i in self.calls[a:b] if i >= frozen) for a, b in itertools.pairwise(ends)]
        cut = [calls for calls in cut if calls]
        belows = itertools.accumulate((len(calls) for calls in cut), initial=0)
        return [
            Run(
                calls,
                below,
                frozen=0 if below else frozen,
                label=self.name if len(cut) == 1 else f"{self.name}[{calls[0]}:{calls[-1] + 1}]",
            )
            for calls, below in zip(cut, belows, strict=False)
        ]


@dataclass(frozen=True)
class Run:
    """Calls of a list's layers, each on what the one before returned."""

    calls: tuple[int, ...]
    """Indices of the layers, in turn."""
    below: int
    """How many calls the list's runs before have."""
    frozen: int
    """Layers below it that stay as they are."""
    label: str
    """Name of the list, where there are several runs with the layers', as a slice."""


def is_peft(model: Any) -> bool:
    """Whether PEFT has decided what trains: it has frozen all but its own weights, and the heads it was told to train.

    Somebody who wrapped the model in it wants that kept.
    """
    return hasattr(model, "peft_config")


@contextmanager
def fitting(model: Any) -> Iterator[None]:
    """A spec's callables are users' code, too: what they raise tells that the spec is not this model's."""
    try:
        yield
    except Exception as error:
        raise UnsupportedModelError(
            f"the ArchitectureSpec of {model.config.model_type!r} does not fit {type(model).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def find_layers(model: nn.Module, spec: ArchitectureSpec, wanted: tuple[str, ...] | None = None) -> list[LayerList]:
    """Every list of the family's layers in the model.

    Args:
        model: the model.
        spec: its family's.
        wanted: names of lists, or of modules around them, or patterns of names; None for all.

    Raises:
        UnsupportedModelError: there is none, or the spec does not fit its layers.
        ValueError: there is no list of a name that is wanted; names those there are.
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        kind = next((i for i, kind in enumerate(spec.layers) if kind.serves(name, module)), None)
        if kind is not None:
            found.append(_describe(model, name, list(module), spec, kind))
    if not found:
        names = [name for kind in spec.layers for name in kind.class_names]
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no list of layers named {' or '.join(names)}{_covered_by_peft(model)}"
        )
    chosen = choose([target.name for target in found], wanted)
    return [target for target in found if target.name in chosen]


def _covered_by_peft(model: nn.Module) -> str:
    """What to say of layers that PEFT has put a module of its own around, as a whole."""
    for name, module in model.named_modules():
        for layer in module if isinstance(module, nn.ModuleList) else ():
            if type(layer).__module__.startswith("peft."):
                return (
                    f": PEFT has put {type(layer).__name__} around whole layers of {name}. A method that works between "
                    "layers is not supported; in the place of layers in modules_to_save, unfreeze them without PEFT "
                    "(requires_grad_) and call reversible(model)"
                )
    return ""


def _describe(model: Any, name: str, layers: list[nn.Module], spec: ArchitectureSpec, kind: int) -> LayerList:
    layer_spec = spec.layers[kind]
    with fitting(model):
        for layer in layers:
            for tap in (layer_spec.ffn_reads(layer), layer_spec.ffn_writes(layer)):
                if not isinstance(tap, nn.Module):
                    raise TypeError(f"ffn_reads and ffn_writes must give modules, not {type(tap).__name__}")
        calls, begins = layer_spec.calls(layers), tuple(layer_spec.begins(model.config))
        if list(begins) != sorted({*begins}) or not all(0 < place < len(calls) for place in begins):
            raise ValueError(f"begins must be ascending indices of layers above the first, not {begins}")
        return LayerList(
            owner=layer_spec.owner(model, name),
            name=name,
            layers=layers,
            calls=calls,
            begins=begins,
            family=model.config.model_type,
            kind=kind,
            spec=layer_spec,
            hidden_size=(layer_spec.hidden_size or spec.hidden_size)(model.config),
            layerdrop=layer_spec.layerdrop(model.config) > 0 and len(calls) == len(layers),
            post_norm=layer_spec.post_norm(model.config),
            in_turn=layer_spec.in_turn(model.config),
            under_peft=is_peft(model),
        )
