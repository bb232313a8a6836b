"""What a layer's call finds in its module, so that the recompute finds the same: modes, hooks, parameters, buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..errors import ReversibleUsageError
from ..modules import modules_of
from .graph import leaf_of
from .replay import no_leaf

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")

_NOTHING = object()

_Change = tuple[dict[str, Any], str, Any]
"""A dictionary, a key in it, and what is to be there."""

_SMALL = 2**16
"""Elements of a buffer that is kept as it was before forward: running statistics, counters, inverse frequencies."""


class _Place(NamedTuple):
    """Where a module holds a tensor."""

    held: dict[str, Any]
    name: str
    tensor: torch.Tensor


def version_of(tensor: torch.Tensor) -> int | None:
    """Changes whenever the tensor is written to."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def _in_place(changes: Sequence[_Change]) -> Iterator[None]:
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
    held = [(part._buffers, name, tensor) for part in modules_of(module) for name, tensor in part._buffers.items()]
    small = [(where, name, tensor) for where, name, tensor in held if tensor is not None and tensor.numel() <= _SMALL]
    with _in_place([(where, name, tensor.clone()) for where, name, tensor in small]):
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
        # The layer's own hooks run around its call, and not in it.
        self._hooks = [(part, _hooks_of(part)) for part in self._parts[1:]]
        self.trained: list[torch.Tensor] = []
        self.leaves: list[torch.Tensor] = []
        self._places: list[_Place] = []
        self._parameters: list[torch.Tensor] = []
        self._small: list[_Place] = []
        self._large: list[tuple[_Place, int | None]] = []
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
                    self._places.append(_Place(part._parameters, name, leaf))
            for name, buffer in part._buffers.items():
                if buffer is None:
                    continue
                if buffer.requires_grad:
                    self._places.append(_Place(part._buffers, name, self._leaf_of(buffer, leaves)))
                elif buffer.numel() <= _SMALL:
                    self._small.append(_Place(part._buffers, name, buffer.clone()))
                else:
                    self._large.append((_Place(part._buffers, name, buffer), version_of(buffer)))
        self.leaves += leaves.values()

    def _leaf_of(self, tensor: torch.Tensor, leaves: dict[int, torch.Tensor]) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in leaves:
            leaves[id(tensor)] = tensor if tensor.is_leaf else tensor.detach().requires_grad_()
            self.trained.append(tensor)
        return leaves[id(tensor)]

    def _argument(self, tensor: torch.Tensor) -> torch.Tensor:
        self._arguments.append(tensor)
        if not tensor.requires_grad:
            return tensor
        leaf = leaf_of(tensor, self._name)
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
        for place, version in self._large:
            if version_of(place.tensor) != version:
                raise ReversibleUsageError(
                    f"{self._name} writes to its buffer {place.name} in forward, and a recompute would do "
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

    def _changes(self) -> list[_Change]:
        changes: list[_Change] = []
        for part, mode in zip(self._parts, self._modes, strict=True):
            if part.training is not mode:
                changes.append((part.__dict__, "training", mode))
        for part, hooks in self._hooks:
            if _hooks_of(part) != hooks:
                changes += [(part.__dict__, kind, (hooks or {}).get(kind, OrderedDict())) for kind in _HOOKS + _FLAGS]
        replaced = [place for place in self._places if place.held.get(place.name) is not place.tensor]
        if any(place.tensor.numel() and not place.tensor.untyped_storage().size() for place in replaced):
            self._refuse_replaced()  # FSDP has taken the whole weights away again
        return [*changes, *replaced, *self._small]

    def _check(self) -> None:
        present = set(map(id, modules_of(self._module)))
        if not all(id(part) in present for part in self._parts) or not all(leaf.requires_grad for leaf in self.leaves):
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
        for name, part in self._module.named_modules():
            for place in self._places:
                if place.tensor is tensor and (place.held is part._parameters or place.held is part._buffers):
                    return f"{name}.{place.name}".lstrip(".")
        return f"an argument of shape {tuple(tensor.shape)}"


def _hooks_of(part: nn.Module) -> dict[str, Any] | None:
    """Copies of a module's hooks by their kinds, None where it has none."""
    found = part.__dict__
    if not any(found[kind] for kind in _HOOKS):
        return None
    return {kind: found[kind].copy() for kind in _HOOKS + _FLAGS}
