"""Changes of several things that happen as a whole or not at all, whatever interrupts them: an error, or Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .modules import modules_of


class all_or_nothing:
    """Run a block; if it is left by an exception, put everything back as it was before.

    That is, of every module of the model and of every object given: its class, its attributes, and what its dicts,
    lists and sets hold (submodules, parameters, hooks). Of every parameter: whether it trains, its gradient, and which
    memory it shows. Takes some microseconds a module, which is nothing beside a training step.
    """

    def __init__(self, model: nn.Module, objects: Iterable[object] = ()) -> None:
        """Of a model, and of other objects and tensors that the block changes."""
        others = list(objects)
        # Lists side by side, not of tuples: so many new objects would have Python collect its garbage each time.
        self._things = [*modules_of(model), *(thing for thing in others if not isinstance(thing, torch.Tensor))]
        self._classes = [type(thing) for thing in self._things]
        self._attributes = [dict(vars(thing)) for thing in self._things]
        held = (value for attributes in self._attributes for value in attributes.values())
        # By type(): a config's __class__ goes through a __getattribute__ of transformers'.
        self._containers: list[Any] = [value for value in held if issubclass(type(value), (dict, list, set))]
        self._contents = [_content(container) for container in self._containers]
        modules = [thing for thing in self._things if isinstance(thing, nn.Module)]
        held_by_modules = (p for module in modules for p in module._parameters.values() if p is not None)
        alone = (thing for thing in others if isinstance(thing, torch.Tensor))
        self._tensors = list({id(p): p for p in (*held_by_modules, *alone)}.values())
        self._trains = [tensor.requires_grad for tensor in self._tensors]
        self._gradients = [tensor.grad if tensor.is_leaf else None for tensor in self._tensors]
        # Of plain tensors; what quantised and distributed ones show is not changed by anything here.
        shown = (*self._tensors, *(gradient for gradient in self._gradients if gradient is not None))
        self._plain = [tensor for tensor in shown if type(tensor) in (nn.Parameter, torch.Tensor)]
        self._shown = [tensor.data for tensor in self._plain]
        self._values: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put these tensors' values back as well, into whose memory the block is about to write."""
        self._values += [(tensor, tensor.detach().clone()) for tensor in tensors]

    def __enter__(self) -> all_or_nothing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.restore()

    def restore(self) -> None:
        """Put all of it back; containers and tensors stay the same objects."""
        for container, content in zip(self._containers, self._contents, strict=True):
            container.clear()
            _fill(container, content)
        for thing, kind, attributes in zip(self._things, self._classes, self._attributes, strict=True):
            if type(thing) is not kind:
                thing.__class__ = kind
            here = vars(thing)
            for name in here.keys() - attributes.keys():
                del here[name]
            here.update(attributes)
        for tensor, data in zip(self._plain, self._shown, strict=True):
            if _moved(tensor, data):
                tensor.data = data
        for tensor, trains, gradient in zip(self._tensors, self._trains, self._gradients, strict=True):
            if tensor.requires_grad != trains:
                tensor.requires_grad_(trains)
            if tensor.is_leaf and tensor.grad is not gradient:
                tensor.grad = gradient
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


def _content(container: Any) -> Any:
    """A module has a dozen containers, most of which are empty: nothing is made for those."""
    return container.copy() if container else ()


def _fill(container: Any, content: Any) -> None:
    container.extend(content) if isinstance(container, list) else container.update(content)


def _moved(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a tensor shows other memory than before, as after a cast or a move to another device."""
    if tensor.device != before.device or tensor.dtype != before.dtype:
        return True
    return not tensor.is_meta and tensor.untyped_storage().data_ptr() != before.untyped_storage().data_ptr()
