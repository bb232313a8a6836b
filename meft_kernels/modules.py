"""Modules and parameters below a module, for what runs in every step of every layer.

``nn.Module.modules()`` and ``parameters()`` make a name for all that they find, in a generator for every level: a
millisecond and more a step for a model of twelve layers, in which a GPU can have nothing to do.
"""

from __future__ import annotations

from typing import Any

from torch import nn


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


def owner_of(model: Any, name: str) -> nn.Module:
    """The nearest transformers model around a module (BertModel, not BertEncoder): the user calls that."""
    parents = [
        name.rsplit(".", depth)[0] if depth <= name.count(".") else "" for depth in range(1, name.count(".") + 2)
    ]
    owners = [model.get_submodule(parent) for parent in parents]
    return next((owner for owner in owners if hasattr(owner, "config") and hasattr(owner, "base_model_prefix")), model)
