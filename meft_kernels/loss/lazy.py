"""Logits that are there when somebody reads them: a tensor with a shape and a graph, and without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..errors import ReversibleUsageError
from .head_call import HeadCall, refuse_second_order

View = Callable[[torch.Tensor], torch.Tensor]

ANSWERS: dict[Any, Callable[..., Any]] = {}
"""What lazy logits answer without being computed, by torch's function; :mod:`~.answers` has them."""


class _Cell:
    """A call shared by lazy logits and their node in the graph: arithmetic in place puts another one there."""

    def __init__(self, call: HeadCall) -> None:
        self.call = call


class _Defer(torch.autograd.Function):
    """The node of lazy logits: what comes back for them goes through the head."""

    @staticmethod
    def forward(ctx: Any, cell: _Cell, hidden: torch.Tensor, *parameters: torch.Tensor) -> LazyLogits:
        ctx.cell = cell
        return LazyLogits._bare(cell)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_order()
        return (None, *ctx.cell.call.gradients(gradient))


class _Read(torch.autograd.Function):
    """The values of lazy logits, in their graph."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, lazy: torch.Tensor) -> torch.Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradient


class LazyLogits(torch.Tensor):
    """Logits [..., V] of a head call that was put off.

    Casts, arithmetic with numbers, and rearranging or choosing rows give lazy logits again; cross-entropy with labels
    is computed in chunks. Whatever else is asked of them computes them, once, and is answered by the real tensor.
    """

    _cell: _Cell
    _rows: int | None
    _real: torch.Tensor | None
    _parent: LazyLogits | None
    _view: View | None
    _has_views: bool
    _read_apart: bool
    _hooked: bool

    @staticmethod
    def _bare(cell: _Cell) -> LazyLogits:
        call = cell.call
        lazy = torch.Tensor._make_wrapper_subclass(LazyLogits, call.shape, dtype=call.dtype, device=call.sample.device)
        lazy._cell = cell
        lazy._rows = lazy._real = lazy._parent = lazy._view = None
        lazy._has_views = lazy._read_apart = lazy._hooked = False
        return lazy

    @classmethod
    def of(
        cls, call: HeadCall, rows: int | None, parent: LazyLogits | None = None, view: View | None = None
    ) -> LazyLogits:
        """Lazy logits of a call.

        Args:
            rows: of a chunk; None for what their number suggests.
            parent: logits with which these would share memory, and ``view``, how.
        """
        cell = _Cell(call)
        lazy: LazyLogits
        lazy = _Defer.apply(cell, call.hidden, *call.head.parameters) if call.recorded else cls._bare(cell)
        lazy._rows = rows
        if parent is not None:
            lazy._parent, lazy._view = parent, view
            parent._has_views = True
        return lazy

    @property
    def call(self) -> HeadCall:
        return self._cell.call

    @property
    def is_read(self) -> bool:
        """Whether the logits, or those with which they share memory, are there already."""
        return self._real is not None or (self._parent is not None and self._parent.is_read)

    @property
    def is_pending(self) -> bool:
        """Whether all there is to know of the logits is their call.

        Not so once they were computed; nor where a Function has put a node of its own behind them (one of
        DistributedDataParallel's clones outputs), through which their gradient must go.
        """
        return not self.is_read and (self.call.recorded or not self.requires_grad)

    def read(self) -> torch.Tensor:
        """The logits, with their graph."""
        if self._real is None:
            if self._parent is not None and self._parent.is_read:
                assert self._view is not None
                self._real = self._view(self._parent.read())
            else:
                values = self.call.values()
                with torch.set_grad_enabled(self.requires_grad):
                    self._real = _Read.apply(values, self)
                if self._parent is not None:
                    self._parent._note_read_apart()
        return self._real

    def _note_read_apart(self) -> None:
        self._read_apart = True
        if self._parent is not None:
            self._parent._note_read_apart()

    def writable(self) -> torch.Tensor:
        """The logits, sharing memory with all views of them as a tensor's do.

        Raises:
            ReversibleUsageError: views of them were computed by themselves, and would not see the change.
        """
        if self._parent is not None and self._real is None:
            self._parent.writable()
        elif self._read_apart or (self._parent is not None and not self._parent.is_read):
            raise ReversibleUsageError(
                "logits are changed in place after others that share their memory were read: change a copy "
                '(logits.clone()), or take loss="full"'
            )
        return self.read()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, LazyLogits) and first.is_pending and func in ANSWERS:
            result = ANSWERS[func](func, first, *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        if func is torch.Tensor.__deepcopy__:  # whose second argument is everybody's memo
            return args[0].read().__deepcopy__(*args[1:])
        if isinstance(first, LazyLogits) and writes(func):
            first.writable()
        real = tree_map_only(LazyLogits, LazyLogits.read, (tuple(args), kwargs))
        result = func(*real[0], **real[1])
        return first if isinstance(first, LazyLogits) and result is first._real else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Below autograd, where only what is not Python's own arrives: ops of other libraries, saved tensors."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default and not args[0].is_read:
            lazy = cls._bare(args[0]._cell)
            lazy._rows, lazy._parent, lazy._view = args[0]._rows, args[0], torch.Tensor.detach
            return lazy
        with torch._C.DisableTorchFunctionSubclass():
            real = tree_map_only(LazyLogits, _below, (tuple(args), kwargs))
            result = func(*real[0], **real[1])
        return args[0] if func._schema.is_mutable and isinstance(args[0], LazyLogits) else result


def _below(lazy: LazyLogits) -> torch.Tensor:
    return lazy.call.values() if lazy._real is None else lazy._real.detach()


def writes(func: Any) -> bool:
    """Whether one of torch's functions changes its first argument."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")


_NOT_IN_PLACE = ("__invert__", "__index__", "__int__", "__init__")


_T = torch.Tensor
_METADATA = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in (
            "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_cpu",
            "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_mps", "is_xpu", "is_xla", "itemsize",
            "nbytes", "_base",
        )
    ),
    _T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.__len__, _T.__hash__, _T.get_device,
    _T.is_floating_point, torch.is_floating_point, _T.is_complex, torch.is_complex, torch.numel, _T.stride,
    _T.is_contiguous, _T.is_inference, torch.is_inference, _T.storage_offset, _T.is_signed,
}  # fmt: skip
