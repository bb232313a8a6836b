"""Modules and parameters below a module, for what runs in every step of every layer.

``nn.Module.modules()`` and ``parameters()`` make a name for all that they find, in a generator for every level: a
millisecond and more a step for a model of twelve layers, in which a GPU can have nothing to do. What was found is asked
for in every step, so it is kept, with all that it was made of: whoever asks compares that first. The comparisons are
written with ``map``, whose loops run in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

from torch import nn

_CHILDREN = attrgetter("_modules")
_VALUES = methodcaller("values")
_HOOKS = attrgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, each once."""
    found = {id(module): module}
    todo = [module]
    while todo:
        for part in todo.pop()._modules.values():
            if part is not None and id(part) not in found:
                found[id(part)] = part
                todo.append(part)
    return list(found.values())


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of the module and of all below it, each once."""
    found = {}
    for part in modules_of(module):
        for parameter in part._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
    return list(found.values())


def same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether both have the same objects in the same order; nobody's ``==`` is asked."""
    return len(some) == len(others) and all(map(is_, some, others))


def held_by(dictionaries: Any) -> list[Any]:
    """The values of all of them, in order."""
    return list(chain.from_iterable(map(_VALUES, dictionaries)))


def has_hooks(part: nn.Module) -> bool:
    """Whether any hook is registered on this module."""
    return bool(part._forward_pre_hooks or part._forward_hooks or part._backward_pre_hooks or part._backward_hooks)


def hooked(parts: Sequence[nn.Module]) -> bool:
    """Whether any hook is registered on any of these modules."""
    return any(chain.from_iterable(map(_HOOKS, parts)))


class Parts:
    """``modules_of`` one module, the same list as long as it has not changed. Copies and pickles are new ones."""

    def __init__(self) -> None:
        self._found: tuple[nn.Module, list[nn.Module], list[Any]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Parts, ()

    def of(self, module: nn.Module) -> list[nn.Module]:
        """The module and all below it, each once; not to be written to."""
        found = self._found
        if found is not None and found[0] is module and same(held_by(map(_CHILDREN, found[1])), found[2]):
            return found[1]
        parts = modules_of(module)
        self._found = module, parts, held_by(map(_CHILDREN, parts))
        return parts


def owner_of(model: Any, name: str) -> nn.Module:
    """The nearest transformers model around a module (BertModel, not BertEncoder): the user calls that."""
    parents = [
        name.rsplit(".", depth)[0] if depth <= name.count(".") else "" for depth in range(1, name.count(".") + 2)
    ]
    owners = [model.get_submodule(parent) for parent in parents]
    return next((owner for owner in owners if hasattr(owner, "config") and hasattr(owner, "base_model_prefix")), model)
