"""What of a layer's module is the same from call to call: found once, and again when anything of it has changed.

Nothing tells when somebody registers a hook, puts another parameter in a place or freezes one. So every call compares
what was looked at then with what is there now, object by object, which is quick, and looks anew where they differ.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain, compress
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..modules import Parts, held_by, hooked, same
from .graph import leaf_of

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_KINDS = _HOOKS + _FLAGS

_HELD = attrgetter("_parameters", "_buffers")
_NEEDS_GRADIENT = attrgetter("requires_grad")
_RUN, _HELD_HOOKS = attrgetter(*_HOOKS), attrgetter(*_KINDS)

Place = tuple[dict[str, Any], str, Any]
"""A dictionary of a module's, a key in it, and what is there, or is to be."""

Hooks = dict[nn.Module, dict[str, Any]]
"""Hooks on modules, by kind; kinds of which there are none are left out."""


class Inventory:
    """The tensors of a module and of all below it.

    Attributes:
        parts: the modules.
        trained: tensors that need a gradient.
        leaves: for each of ``trained`` what the recompute differentiates by: itself, or a detached one where it was
            computed.
        places: where parameters and such buffers are, and what stands for them.
        parameters: what stands for every parameter.
        buffers: all others, and where they are.
    """

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts
        self.trained: list[torch.Tensor] = []
        self.leaves: list[torch.Tensor] = []
        self.places: list[Place] = []
        self.parameters: list[torch.Tensor] = []
        self.buffers: list[Place] = []
        leaves: dict[int, torch.Tensor] = {}
        for part in parts:
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    leaf = self._leaf_of(parameter, leaves)
                    self.parameters.append(leaf)
                    self.places.append((part._parameters, name, leaf))
            for name, buffer in part._buffers.items():
                if buffer is None:
                    continue
                if buffer.requires_grad:
                    self.places.append((part._buffers, name, self._leaf_of(buffer, leaves)))
                else:
                    self.buffers.append((part._buffers, name, buffer))
        self.leaves += leaves.values()
        self._dictionaries, self._names, self._values = self._look()
        self._tensors = [value for value in self._values if value is not None]
        self._needs = self._needed()

    def _leaf_of(self, tensor: torch.Tensor, leaves: dict[int, torch.Tensor]) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in leaves:
            leaves[id(tensor)] = tensor if tensor.is_leaf else leaf_of(tensor)
            self.trained.append(tensor)
        return leaves[id(tensor)]

    def _look(self) -> tuple[list[dict[str, Any]], list[str], list[Any]]:
        """The dictionaries that hold tensors, their keys and their values."""
        dictionaries = list(chain.from_iterable(map(_HELD, self.parts)))
        return dictionaries, list(chain.from_iterable(dictionaries)), held_by(dictionaries)

    def _needed(self) -> list[bool]:
        return list(map(_NEEDS_GRADIENT, self._tensors))

    @property
    def is_true(self) -> bool:
        """Whether it would turn out the same now, for these modules."""
        dictionaries, names, values = self._look()
        return (
            same(values, self._values)
            and names == self._names
            and same(dictionaries, self._dictionaries)
            and self._needed() == self._needs
        )

    @property
    def lasts(self) -> bool:
        """Whether it serves another call: not if it holds what somebody has computed, and the graph behind it."""
        return same(self.trained, self.leaves)


class Inventories:
    """The inventory of one module. Copies and pickles are new ones."""

    def __init__(self) -> None:
        self._parts = Parts()
        self._last: Inventory | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Inventories, ()

    def parts(self, module: nn.Module) -> list[nn.Module]:
        """The module and all below it; the same list as long as it has not changed."""
        return self._parts.of(module)

    def of(self, module: nn.Module) -> Inventory:
        """The inventory now: the same object as long as nothing has changed."""
        parts, last = self.parts(module), self._last
        if last is not None and last.parts is parts and last.is_true:
            return last
        made = Inventory(parts)
        self._last = made if made.lasts else None
        return made


def hooks_below(parts: list[nn.Module]) -> Hooks:
    """The hooks in a layer as they are now. Its own run around its call, and not in it."""
    below = parts[1:]
    if not hooked(below):
        return {}
    found = compress(below, map(any, map(_RUN, below)))
    return {part: {kind: held for kind, held in zip(_KINDS, _HELD_HOOKS(part), strict=True) if held} for part in found}


def copied(hooks: Hooks) -> Hooks:
    """The same, whatever is registered or taken off afterwards."""
    return {part: {kind: held.copy() for kind, held in kinds.items()} for part, kinds in hooks.items()}


def hook_changes(before: Hooks, now: Hooks) -> list[Place]:
    """What puts the hooks of ``before`` back."""
    if before == now:
        return []
    return [
        (part.__dict__, kind, OrderedDict(before.get(part, {}).get(kind, ())))
        for part in {**now, **before}
        for kind in _KINDS
    ]
