"""Logits that are there when somebody reads them: a tensor with a shape and a graph, and without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from ..errors import ReversibleUsageError
from .chunks import ChunkedCrossEntropy, chunk_rows
from .head_call import HeadCall, refuse_second_order

View = Callable[[torch.Tensor], torch.Tensor]


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

    def read(self) -> torch.Tensor:
        """The logits, with their graph."""
        if self._real is None:
            if self._parent is not None and self._parent.is_read:
                assert self._view is not None
                self._real = self._view(self._parent.read())
            else:
                values = self.call.values()
                with torch.set_grad_enabled(self.call.recorded):
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
        if isinstance(first, LazyLogits) and not first.is_read and func in HANDLERS:
            result = HANDLERS[func](func, first, *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        if func is torch.Tensor.__deepcopy__:  # whose second argument is everybody's memo
            return args[0].read().__deepcopy__(*args[1:])
        if isinstance(first, LazyLogits) and _writes(func):
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


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")


_NOT_IN_PLACE = ("__invert__", "__index__", "__int__", "__init__")


def _cross_entropy(
    func: Any,
    lazy: LazyLogits,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Any = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    call = lazy.call
    plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum", "none")
    fits = lazy.dim() == 2 and target.dtype == torch.int64 and target.shape == lazy.shape[:1]
    recorded = call.recorded and torch.is_grad_enabled()
    # A hook waits for the logits' own gradient; each row's own loss has no sum to take the weights' gradient of.
    if not plain or not fits or lazy._hooked or (reduction == "none" and recorded and call.head.parameters):
        return NotImplemented
    if target.device != call.hidden.device or not 0 <= label_smoothing <= 1:
        return NotImplemented  # torch has words for it
    call.check()
    count, width = call.hidden.shape
    vocabulary = call.sample.shape[-1]
    rows = lazy._rows or chunk_rows(
        count, width, vocabulary, call.hidden.device, trained=recorded and bool(call.head.parameters)
    )
    # Autocast computes this loss in float32; without it, its dtype is the logits'.
    dtype = torch.promote_types(call.dtype, torch.float32) if _autocast(call.hidden.device) else call.dtype
    return ChunkedCrossEntropy.apply(
        call, target, ignore_index, reduction, label_smoothing, rows, dtype, recorded, call.hidden,
        *call.head.parameters,
    )  # fmt: skip


def _autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _cast(func: Any, lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    call = lazy.call
    sample = func(call.sample, *args, **kwargs)
    if not isinstance(sample, torch.Tensor) or (sample.device, sample.layout) != (call.sample.device, torch.strided):
        return NotImplemented
    dtype = sample.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    if sample is call.sample:
        return lazy
    return LazyLogits.of(call.then(lambda logits: logits.to(dtype)), lazy._rows)


def _operation(func: Any, lazy: LazyLogits, *operands: Any, **kwargs: Any) -> Any:
    """Arithmetic with numbers, and with tensors that are the same for all rows."""
    call = lazy.call
    taken, read = [], []
    for operand in (*operands, *kwargs.values()):
        if isinstance(operand, torch.Tensor):
            same = operand.numel() == 1 or operand.shape[-1:] == lazy.shape[-1:] == (operand.numel(),)
            if isinstance(operand, LazyLogits) or operand.requires_grad or not same or operand.ndim > lazy.ndim:
                return NotImplemented
            read.append(operand)
    for operand in operands:
        taken.append(operand.reshape(operand.shape[-1:]) if isinstance(operand, torch.Tensor) else operand)

    def operation(logits: torch.Tensor) -> torch.Tensor:
        return func(logits, *taken, **kwargs)

    operation.keeps_output = "tanh" in func.__name__  # type: ignore[attr-defined]
    if _writes(func):
        if lazy._parent is not None or lazy._has_views or lazy._hooked or kwargs.get("out") is not None:
            return NotImplemented
        if call.recorded != (call.recorded and torch.is_grad_enabled()):
            return NotImplemented
        lazy._cell.call = call.then(operation, read)
        return lazy
    changed = call.then(operation, read)
    return LazyLogits.of(changed, lazy._rows) if changed.dtype.is_floating_point else NotImplemented


def _rearranged(func: Any, lazy: LazyLogits, *shape: Any, **kwargs: Any) -> Any:
    """Rows in another arrangement, each of them whole."""
    if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size):
        shape = tuple(shape[0])
    if kwargs or not shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    vocabulary, leading = lazy.shape[-1], shape[:-1]
    if shape.count(-1) > 1 or not leading or not lazy.numel():
        return NotImplemented
    if shape[-1] == -1:
        known = 1
        for size in leading:
            known *= size
        if known * vocabulary != lazy.numel():
            return NotImplemented
    elif shape[-1] != vocabulary:
        return NotImplemented
    return _rows(func, lazy, lambda hidden: hidden.reshape(*leading, hidden.shape[-1]), lambda real: func(real, *shape))


def _flattened(func: Any, lazy: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    last = end_dim % lazy.ndim
    if last == lazy.ndim - 1 or not lazy.numel():
        return NotImplemented
    view = lambda tensor: torch.flatten(tensor, start_dim % lazy.ndim, last)  # noqa: E731
    return _rows(func, lazy, view, view)


def _chosen(func: Any, lazy: LazyLogits, index: Any) -> Any:
    """Rows that are chosen by the dimensions before the last."""
    items = index if isinstance(index, tuple) else (index,)
    used, after_ellipsis, basic = 0, False, True
    for item in items:
        if type(item) is torch.Tensor and item.dtype in (torch.bool, torch.int64):
            basic = False
            used += item.ndim if item.dtype == torch.bool else 1
        elif item is Ellipsis:
            after_ellipsis = True
        elif item is None or isinstance(item, int | slice):
            used += item is not None and not isinstance(item, bool)
            if isinstance(item, bool):
                return NotImplemented
        else:
            return NotImplemented
    whole_last = isinstance(items[-1], slice) and items[-1] == slice(None)
    if used > lazy.ndim or not (whole_last or (used < lazy.ndim and (items[-1] is Ellipsis or not after_ellipsis))):
        return NotImplemented
    choose = lambda tensor: tensor[index]  # noqa: E731
    return _rows(func, lazy, choose, choose if basic else None)


def _rows(func: Any, lazy: LazyLogits, of_hidden: View, of_logits: View | None) -> LazyLogits:
    """Lazy logits of other rows; ``of_logits`` where these share the memory of those."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and lazy.call.recorded):
        hidden = of_hidden(lazy.call.hidden)
    parent = None if of_logits is None else lazy
    return LazyLogits.of(lazy.call.of(hidden), lazy._rows, parent, of_logits)


def _same(func: Any, lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if args or kwargs else lazy


def _cloned(func: Any, lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if args or kwargs else LazyLogits.of(lazy.call.of(lazy.call.hidden), lazy._rows)


def _detached(func: Any, lazy: LazyLogits) -> LazyLogits:
    return LazyLogits.of(lazy.call.without_graph(), lazy._rows, lazy, torch.Tensor.detach)


def _hook(func: Any, lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """Fully sharded models hook their outputs: no reason to compute them, but the gradient must then pass here."""
    lazy._hooked = True
    with torch._C.DisableTorchFunctionSubclass():
        return func(lazy, *args, **kwargs)


_T = torch.Tensor
HANDLERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    **dict.fromkeys([_T.float, _T.double, _T.half, _T.bfloat16, _T.to, _T.type, _T.type_as, _T.cpu], _cast),
    **dict.fromkeys(
        [
            torch.mul, torch.multiply, torch.div, torch.divide, torch.true_divide, torch.add, torch.sub, torch.tanh,
            _T.mul, _T.multiply, _T.div, _T.divide, _T.true_divide, _T.add, _T.sub, _T.tanh,
            _T.__mul__, _T.__rmul__, _T.__truediv__, _T.__add__, _T.__radd__, _T.__sub__,
            _T.mul_, _T.div_, _T.add_, _T.sub_, _T.tanh_, torch.tanh_,
            _T.__imul__, _T.__itruediv__, _T.__iadd__, _T.__isub__,
        ],
        _operation,
    ),
    **dict.fromkeys([_T.view, _T.reshape, torch.reshape], _rearranged),
    **dict.fromkeys([_T.flatten, torch.flatten], _flattened),
    _T.__getitem__: _chosen,
    _T.contiguous: _same,
    **dict.fromkeys([_T.clone, torch.clone], _cloned),
    **dict.fromkeys([_T.detach, torch.detach], _detached),
    _T.register_hook: _hook,
}  # fmt: skip
"""What lazy logits answer without being computed, as long as nothing has computed them."""

_METADATA = {
    *(
        getattr(_T, name).__get__
        for name in (
            "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_cpu",
            "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_mps", "is_xpu", "is_xla", "itemsize",
            "nbytes",
        )
    ),
    _T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.__len__, _T.__hash__, _T.get_device,
    _T.is_floating_point, torch.is_floating_point, _T.is_complex, torch.is_complex, torch.numel, _T.stride,
    _T.is_contiguous, _T.is_inference, torch.is_inference, _T.storage_offset, _T.is_signed,
}  # fmt: skip
