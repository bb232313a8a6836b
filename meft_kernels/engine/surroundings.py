"""What a layer's call finds in its module, so that the recompute finds the same: modes, hooks, parameters, buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..errors import ReversibleUsageError
from ..modules import modules_of
from .graph import guarded_leaf_of, leaf_of
from .replay import no_leaf

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")

_NOTHING = object()

_Place = tuple[dict[str, Any], str, Any]
"""A dictionary of a module's, a key in it, and what is there, or is to be."""

_SMALL = 2**16
"""Elements of a buffer that is kept as it was before forward: running statistics, counters, inverse frequencies."""


def version_of(tensor: torch.Tensor) -> int | None:
    """Changes whenever the tensor is written to."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def _in_place(changes: list[_Place]) -> Iterator[None]:
    """Run a block with these made."""
    before = [held.get(key, _NOTHING) for held, key, _ in changes]
    for held, key, value in changes:
        held[key] = value
    try:
        yield
    finally:
        for (held, key, _), value in zip(changes, before, strict=True):
            if value is _NOTHING:
                del held[key]
            else:
                held[key] = value


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Run a block whose forwards leave running statistics and the like as they were."""
    with _in_place(
        [
            (part._buffers, name, buffer.clone())
            for part in modules_of(module)
            for name, buffer in part._buffers.items()
            if buffer is not None and buffer.numel() <= _SMALL
        ]
    ):
        yield


class Surroundings:
    """See above; taken before the layer's forward, and put in place again for its recompute.

    What differs by then (hooks taken off, another mode, ``functional_call`` at its end) is put back for as long as the
    recompute runs. What cannot be put back is refused.

    Attributes:
        trained: tensors that need a gradient, in the module or among the arguments.
        leaves: what the recompute differentiates by: parameters themselves, and detached tensors in the place of
            arguments and of whatever else was computed.
        kwargs: the arguments, with those leaves in place.
    """

    def __init__(self, module: nn.Module, name: str, kwargs: dict[str, Any]) -> None:
        self._module, self._name = module, name
        self._parts = modules_of(module)
        self._modes = [part.training for part in self._parts]
        self._hooks = _hooks_below(self._parts)
        self.trained: list[torch.Tensor] = []
        self.leaves: list[torch.Tensor] = []
        self._places: list[_Place] = []
        self._parameters: list[torch.Tensor] = []
        self._small: list[_Place] = []
        self._large: list[tuple[str, torch.Tensor, int | None]] = []
        self._arguments: list[torch.Tensor] = []
        self._versions: list[int | None] = []
        self._look(self._parts)
        self.kwargs: dict[str, Any] = tree_map_only(torch.Tensor, self._argument, kwargs)

    def _look(self, parts: list[nn.Module]) -> None:
        leaves: dict[int, torch.Tensor] = {}
        for part in parts:
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    leaf = self._leaf_of(parameter, leaves)
                    self._parameters.append(leaf)
                    self._places.append((part._parameters, name, leaf))
            for name, buffer in part._buffers.items():
                if buffer is None:
                    continue
                if buffer.requires_grad:
                    self._places.append((part._buffers, name, self._leaf_of(buffer, leaves)))
                elif buffer.numel() <= _SMALL:
                    self._small.append((part._buffers, name, buffer.clone()))
                else:
                    self._large.append((name, buffer, version_of(buffer)))
        self.leaves += leaves.values()

    def _leaf_of(self, tensor: torch.Tensor, leaves: dict[int, torch.Tensor]) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in leaves:
            leaves[id(tensor)] = tensor if tensor.is_leaf else leaf_of(tensor)
            self.trained.append(tensor)
        return leaves[id(tensor)]

    def _argument(self, tensor: torch.Tensor) -> torch.Tensor:
        self._arguments.append(tensor)
        if not tensor.requires_grad:
            return tensor
        leaf = guarded_leaf_of(tensor, self._name)
        self.trained.append(tensor)
        self.leaves.append(leaf)
        return no_leaf(leaf)

    def computed(self) -> dict[Any, torch.Tensor]:
        """Where the graphs of computed tensors in the module begin, and the leaves that stand for them."""
        pairs = zip(self.trained, self.leaves, strict=True)
        return {tensor.grad_fn: leaf for tensor, leaf in pairs if tensor.grad_fn is not None}

    def settle(self) -> None:
        """Forward is over: from now on nothing may be written to.

        Raises:
            ReversibleUsageError: forward itself has written to a buffer that is too large to be kept.
        """
        for name, buffer, version in self._large:
            if version_of(buffer) != version:
                raise ReversibleUsageError(
                    f"{self._name} writes to its buffer {name} in forward, and a recompute would do "
                    "so once more: put the module that does it into eval mode, or patch(model, engine='autograd')"
                )
        self._versions = [version_of(tensor) for tensor in self._unchanged()]
        self.trained = []  # they hold graphs

    def _unchanged(self) -> list[torch.Tensor]:
        """Not the buffers: DistributedDataParallel writes to all of them in each forward, with the same values."""
        return [*self._parameters, *self._arguments]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run the recompute.

        Raises:
            ReversibleUsageError: modules are gone, or weights were frozen or written to.
        """
        self._check()
        with _in_place(self._changes()):
            yield

    def _changes(self) -> list[_Place]:
        changes: list[_Place] = [
            (part.__dict__, "training", mode)
            for part, mode in zip(self._parts, self._modes, strict=True)
            if part.training is not mode
        ]
        hooks = _hooks_below(self._parts)
        if hooks != self._hooks:
            for part in {**hooks, **self._hooks}:
                before = self._hooks.get(part, {})
                changes += [(part.__dict__, kind, before.get(kind, OrderedDict())) for kind in _HOOKS + _FLAGS]
        replaced = [(held, name, leaf) for held, name, leaf in self._places if held.get(name) is not leaf]
        if any(leaf.numel() and not leaf.untyped_storage().size() for _, _, leaf in replaced):
            self._refuse_replaced()  # FSDP has taken the whole weights away again
        return [*changes, *replaced, *self._small]

    def _check(self) -> None:
        present = modules_of(self._module)
        gone = present != self._parts and not set(present).issuperset(self._parts)
        if gone or not all(leaf.requires_grad for leaf in self.leaves):
            self._refuse_replaced()
        for tensor, version in zip(self._unchanged(), self._versions, strict=True):
            if version_of(tensor) != version:
                raise ReversibleUsageError(
                    f"{self.name_of(tensor)} of {self._name} was changed in place between forward and backward, whose "
                    "gradients would be those of other values: run backward first, then change weights "
                    "(optimizer.step(), merging an adapter, loading a state dict) or refill a batch"
                )

    def _refuse_replaced(self) -> NoReturn:
        raise ReversibleUsageError(
            f"modules or trainable parameters of {self._name} were replaced or frozen between forward and backward "
            "(unpatch, another adapter switched on or off, a module swapped): run backward first"
        )

    def name_of(self, tensor: torch.Tensor) -> str:
        """What the module calls the tensor."""
        for prefix, part in self._module.named_modules():
            for held, name, leaf in self._places:
                if leaf is tensor and (held is part._parameters or held is part._buffers):
                    return f"{prefix}.{name}".lstrip(".")
        return f"an argument of shape {tuple(tensor.shape)}"


def _hooks_below(parts: list[nn.Module]) -> dict[nn.Module, dict[str, Any]]:
    """Copies of the hooks in a layer, by module and kind. Its own run around its call, and not in it."""
    return {
        part: {kind: part.__dict__[kind].copy() for kind in _HOOKS + _FLAGS}
        for part in parts[1:]
        if part._forward_pre_hooks or part._forward_hooks or part._backward_pre_hooks or part._backward_hooks
    }
