"""What a part of a layer gives that is left out: nothing, in its shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

_DROPOUTS: set[Callable[..., Any]] = {F.dropout, torch.dropout}
_SUMS: set[Callable[..., Any]] = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


class Nothing(torch.Tensor):
    """Zeros that take no memory, with which nothing is computed where that can be avoided.

    A sum with them is its other part, and what is made of them alone is nothing again: an activation, a product with a
    number, dropout, which draws no random numbers. So a layer without its FFN takes the memory and draws the numbers
    that its attention does, and no more, as a block written by hand. Anything else gets zeros.
    """

    @classmethod
    def like(cls, tensor: torch.Tensor, shape: tuple[int, ...]) -> Nothing:
        """Of that shape, in the tensor's dtype, on its device."""
        return _nothing(tensor.dtype, tensor.device, shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _DROPOUTS and args:
                return args[0]
            if func in _SUMS and len(args) == 2 and not kwargs and isinstance(args[0], torch.Tensor):
                one, other = args
                rest = other if isinstance(one, cls) else one
                alike = isinstance(other, torch.Tensor) and one.shape == other.shape
                if alike and torch.result_type(one, other) == rest.dtype:
                    return rest
            if getattr(func, "__name__", "") == "__get__":  # an attribute: its shape, say
                return func(*args, **kwargs)
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if all(isinstance(tensor, cls) for tensor in tensors):
                try:
                    shapes = func(*tree_map_only(cls, _shape, args), **tree_map_only(cls, _shape, kwargs))
                    device = tensors[0].device
                    return tree_map_only(torch.Tensor, lambda made: _nothing(made.dtype, device, made.shape), shapes)
                except (NotImplementedError, RuntimeError):  # it asks for values
                    pass
            return func(*tree_map_only(cls, _zeros, args), **tree_map_only(cls, _zeros, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map_only(cls, _zeros, args), **tree_map_only(cls, _zeros, kwargs or {}))


def _nothing(dtype: torch.dtype, device: torch.device, shape: Any) -> Nothing:
    made: Nothing = torch.Tensor._make_wrapper_subclass(Nothing, shape, dtype=dtype, device=device)
    return made


def _shape(tensor: Nothing) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _zeros(tensor: Nothing) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
