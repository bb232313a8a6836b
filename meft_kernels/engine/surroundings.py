"""What a layer's call finds in its module, so that the recompute finds the same: modes, hooks, parameters, buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..errors import ReversibleUsageError
from ..modules import modules_of
from .graph import guarded_leaf_of
from .inventory import Inventories, Inventory, Place, copied, hook_changes, hooks_below
from .replay import no_leaf

_NOTHING = object()

_MODE, _VERSION, _NEEDS_GRADIENT = attrgetter("training"), attrgetter("_version"), attrgetter("requires_grad")

_PLAIN = (type(None), bool, int, float, str)
"""Types of arguments in which there is no tensor."""

_SMALL = 2**16
"""Elements of a buffer that is kept as it was before forward: running statistics, counters, inverse frequencies."""


def version_of(tensor: torch.Tensor) -> int | None:
    """Changes whenever the tensor is written to."""
    return None if tensor.is_inference() else tensor._version


def _versions_of(tensors: list[torch.Tensor]) -> list[int | None]:
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:  # there is an inference tensor among them, which keeps none
        return [version_of(tensor) for tensor in tensors]


@contextmanager
def _in_place(changes: list[Place]) -> Iterator[None]:
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

    def __init__(
        self, module: nn.Module, name: str, kwargs: dict[str, Any], inventories: Inventories | None = None
    ) -> None:
        self._module, self._name = module, name
        self._inventories = inventories or Inventories()
        self._inventory: Inventory | None = self._inventories.of(module)
        inventory = self._inventory
        self._parts = inventory.parts
        self._modes = list(map(_MODE, self._parts))
        self._hooks = copied(hooks_below(self._parts))
        self.trained: list[torch.Tensor] = [*inventory.trained]
        self.leaves: list[torch.Tensor] = [*inventory.leaves]
        self._places = inventory.places
        self._parameters = inventory.parameters
        self._small: list[Place] = []
        self._large: list[tuple[str, torch.Tensor, int | None]] = []
        self._arguments: list[torch.Tensor] = []
        self._versions: list[int | None] = []
        for held, key, buffer in inventory.buffers:
            if buffer.numel() <= _SMALL:
                self._small.append((held, key, buffer.clone()))
            else:
                self._large.append((key, buffer, version_of(buffer)))
        self.kwargs: dict[str, Any] = {key: self._with_leaves(value) for key, value in kwargs.items()}

    def _with_leaves(self, value: Any) -> Any:
        """An argument with leaves in the place of its tensors: what ``tree_map_only`` does, which takes its time."""
        if isinstance(value, torch.Tensor):
            return self._argument(value)
        if isinstance(value, _PLAIN):
            return value
        if type(value) is tuple:
            return tuple([self._with_leaves(each) for each in value])
        return tree_map_only(torch.Tensor, self._argument, value)

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
        self._versions = _versions_of(self._unchanged())
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
        # The same object: modules, parameters and which of them are trained are what they were.
        unchanged = self._inventories.of(self._module) is self._inventory
        self._check(unchanged)
        with _in_place(self._changes(unchanged)):
            yield

    def _changes(self, unchanged: bool) -> list[Place]:
        changes: list[Place] = []
        if list(map(_MODE, self._parts)) != self._modes:
            changes += [
                (part.__dict__, "training", mode)
                for part, mode in zip(self._parts, self._modes, strict=True)
                if part.training is not mode
            ]
        changes += hook_changes(self._hooks, hooks_below(self._parts))
        if not unchanged:
            replaced = [(held, name, leaf) for held, name, leaf in self._places if held.get(name) is not leaf]
            if any(leaf.numel() and not leaf.untyped_storage().size() for _, _, leaf in replaced):
                self._refuse_replaced()  # FSDP has taken the whole weights away again
            changes += replaced
        return [*changes, *self._small]

    def _check(self, unchanged: bool) -> None:
        if not unchanged:
            present = self._inventories.parts(self._module)
            if present != self._parts and not set(present).issuperset(self._parts):
                self._refuse_replaced()
        if not all(map(_NEEDS_GRADIENT, self.leaves)):
            self._refuse_replaced()
        tensors = self._unchanged()
        versions = _versions_of(tensors)
        if versions == self._versions:
            return
        for tensor, before, now in zip(tensors, self._versions, versions, strict=True):
            if before != now:
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
