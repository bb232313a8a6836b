"""What lazy logits answer without being computed: casts, arithmetic, other rows, and above all cross-entropy.

Each takes torch's function, the logits and the other arguments, and gives ``NotImplemented`` where the real logits must
be asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .chunks import ChunkedCrossEntropy, chunk_rows
from .lazy import ANSWERS, LazyLogits, View, writes


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
    if writes(func):
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
_TABLE: dict[Any, Callable[..., Any]] = {
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
ANSWERS.update(_TABLE)
