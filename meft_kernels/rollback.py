"""Changes of several things that happen as a whole or not at all, whatever interrupts them: an error, or Ctrl-C."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .modules import modules_of


class all_or_nothing:
    """Run a block; if it is left by an exception, put everything back as it was before.

    That is, of every module of the model and of every object given: its attributes, and what its dicts, lists and sets
    hold (submodules, parameters, hooks). Of every parameter: whether it trains, its gradient, and which memory it
    shows. Takes some microseconds a module, which is nothing beside a training step.
    """

    def __init__(self, model: nn.Module, objects: Iterable[object] = ()) -> None:
        """Of a model, and of other objects and tensors that the block changes."""
        others = list(objects)
        things = [*modules_of(model), *(thing for thing in others if not isinstance(thing, torch.Tensor))]
        self._attributes = [(thing, dict(vars(thing))) for thing in things]
        held = [value for _, attributes in self._attributes for value in attributes.values()]
        self._containers = [(value, copy.copy(value)) for value in held if isinstance(value, dict | list | set)]
        modules = [thing for thing in things if isinstance(thing, nn.Module)]
        held_by_modules = (p for module in modules for p in module._parameters.values() if p is not None)
        alone = (thing for thing in others if isinstance(thing, torch.Tensor))
        parameters = {id(p): p for p in (*held_by_modules, *alone)}.values()
        self._parameters = [(p, p.requires_grad, p.grad) for p in parameters]
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        # Of plain tensors; what quantised and distributed ones show is not changed by anything here.
        self._shown = [(t, t.data) for t in tensors if type(t) in (nn.Parameter, torch.Tensor)]
        self._values: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put these tensors' values back as well, into whose memory the block is about to write."""
        self._values += [(tensor, tensor.detach().clone()) for tensor in tensors]

    def __enter__(self) -> all_or_nothing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._restore()

    def _restore(self) -> None:
        """Put all of it back; containers and tensors stay the same objects."""
        for container, content in self._containers:
            container.clear()
            _fill(container, content)
        for thing, attributes in self._attributes:
            here = vars(thing)
            for name in here.keys() - attributes.keys():
                del here[name]
            here.update(attributes)
        for tensor, data in self._shown:
            if _moved(tensor, data):
                tensor.data = data
        for parameter, required_grad, gradient in self._parameters:
            if parameter.requires_grad != required_grad:
                parameter.requires_grad_(required_grad)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


def _fill(container: Any, content: Any) -> None:
    container.extend(content) if isinstance(container, list) else container.update(content)


def _moved(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a tensor shows other memory than before, as after a cast or a move to another device."""
    if tensor.device != before.device or tensor.dtype != before.dtype:
        return True
    return not tensor.is_meta and tensor.untyped_storage().data_ptr() != before.untyped_storage().data_ptr()
