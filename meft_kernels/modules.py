"""Modules and parameters below a module, for what runs in every step of every layer.

``nn.Module.modules()`` and ``parameters()`` make a name for all that they find, in a generator for every level: a
millisecond and more a step for a model of twelve layers, in which a GPU can have nothing to do.
"""

from __future__ import annotations

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
