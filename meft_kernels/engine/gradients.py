"""Whether a gradient of a stream may be written to: those that one layer hands to the next, and nobody else holds."""

from __future__ import annotations

import functools
import sys
import weakref
from typing import Any, NamedTuple

import torch


class _Holders(NamedTuple):
    """How many hold on to a tensor: as Python's object, as autograd's, and its memory (a view of it)."""

    objects: int
    tensors: int
    storages: int


def _holders(tensor: torch.Tensor) -> _Holders:
    counts: Any = torch._C
    return _Holders(
        sys.getrefcount(tensor),
        tensor._use_count(),  # type: ignore[attr-defined]
        counts._storage_Use_Count(tensor.untyped_storage()._cdata),
    )


class HandedDown:
    """The gradients that the last layer's backward returned.

    Autograd passes them on as they are to the layer below, where they may be accumulated into, instead of copied, if
    nobody took hold of them on the way: a hook on the hidden states between two layers, ``retain_grad``, or
    ``torch.autograd.grad`` with respect to them.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        if enabled and torch.is_grad_enabled():
            _alone()  # measured here once, and not in the middle of somebody's backward
        self._ours: list[weakref.ref[torch.Tensor]] = []

    def give(self, *gradients: torch.Tensor) -> None:
        """These are ours and are returned to autograd now."""
        self._ours = [weakref.ref(gradient) for gradient in gradients] if self._enabled else []

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor, an argument of the running backward, is one of those and is held by nobody else."""
        for reference in self._ours:
            if reference() is tensor:
                alone = _alone()
                return alone is not None and _holders(tensor) == alone
        return False


class _Measured(torch.autograd.Function):
    """Meets the gradient of another node of its own kind, as layers do."""

    @staticmethod
    def forward(ctx: Any, found: list[_Holders], x: torch.Tensor) -> torch.Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d_x: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.found.append(_Asked.holders(d_x))
        return None, d_x.clone()


class _Asked:
    """Counts from as deep as ``HandedDown.owns`` does; each call adds a holder of the object."""

    @staticmethod
    def holders(tensor: torch.Tensor) -> _Holders:
        return _holders(tensor)


@functools.cache
def _alone() -> _Holders | None:
    """The counts of a gradient that nobody else holds, measured; None where this Python or torch keeps no count."""
    found: list[_Holders] = []
    try:
        with torch.enable_grad():
            x = torch.zeros(1, requires_grad=True)
            _Measured.apply(found, _Measured.apply(found, x)).sum().backward()
    except AttributeError:
        return None
    return found[-1]
