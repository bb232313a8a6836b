"""A meter for the bytes of live tensors, exact to the byte and the same on every device."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

T = TypeVar("T")

_on_host: ContextVar[bool] = ContextVar("meft_kernels_on_host", default=False)
_shortened: ContextVar[bool] = ContextVar("meft_kernels_shortened", default=False)


@contextlib.contextmanager
def host_allocation() -> Iterator[None]:
    """Tensors allocated inside are the host's: for :class:`LiveTensorMeter`, where all tensors are on one device.

    A copy that waits in host memory is made inside, pinned or not. On a CPU and in a simulation nothing else tells it
    from what a GPU would hold.
    """
    token = _on_host.set(True)
    try:
        yield
    finally:
        _on_host.reset(token)


@contextlib.contextmanager
def shortening() -> Iterator[None]:
    """Inside, :func:`shortened` leaves the middle of a loop out."""
    token = _shortened.set(True)
    try:
        yield
    finally:
        _shortened.reset(token)


def shortened(pieces: Sequence[T]) -> Sequence[T]:
    """What a loop over equal pieces goes through: all of them, but where tensors hold no data and only bytes count.

    There the first two and the last two do: the first makes what is summed up, and the last may be smaller. So it is
    for loops whose pieces write where there is room already and leave nothing behind: every further one then allocates
    and frees what the second does.
    """
    return [*pieces[:2], *pieces[-2:]] if _shortened.get() and len(pieces) > 4 else pieces


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Those in what an op takes or gives. pytree, which knows more containers, takes a sixth of a simulated step."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors([*values.values()])


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """The storages behind every tensor in nested ``values``, those inside wrapper subclasses too."""
    for value in _tensors(values):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages([getattr(value, name) for name in names])
        else:
            try:
                yield value.untyped_storage()
            except NotImplementedError:  # sparse layouts have none
                continue


class LiveTensorMeter(TorchDispatchMode):
    """Counts the bytes of tensors allocated inside a ``with`` block and still alive.

    What an allocator reports depends on its rounding and its cache, and on a CPU there is nothing to ask; this
    counts storages, so that a figure taken on a CPU, with fake tensors or on a GPU means the same. A storage counts
    once however many views share it, and until it is freed, also when that happens after the block.

    >>> with LiveTensorMeter() as meter:
    ...     loss = model(**batch).loss
    ...     kept = meter.live_bytes  # what the backward pass will need
    ...     loss.backward()
    >>> meter.peak_bytes

    The backward pass is seen: on a CPU it runs in the caller's thread, and for CUDA autograd hands the caller's
    dispatch modes on to its device threads. Not seen: memory that no dispatched op allocates, which is the workspace
    inside a kernel, what a ``torch.compile``d graph allocates for itself, and the storage of sparse tensors.

    Args:
        device: whose memory is meant: of a GPU, say, so that pinned tensors beside it are the host's. None: every
            device's, but for what is made in :func:`host_allocation`.

    Attributes:
        live_bytes: bytes alive now.
        peak_bytes: the highest ``live_bytes`` since the block began, or since :meth:`reset_peak`.
        host_bytes: bytes alive now in host memory, which are no part of ``live_bytes``.
        host_peak_bytes: the highest ``host_bytes``, likewise.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.host_bytes = self.host_peak_bytes = 0
        self._device_type = None if device is None else torch.device(device).type
        # By id of the storage's Python object: torch keeps that object as long as the storage lives, and the weakref's
        # callback takes the entry out before the id can be used again. With its bytes, and whether they are the host's.
        self._entries: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, bool]] = {}

    def reset_peak(self) -> None:
        """Forget the peaks so far."""
        self.peak_bytes, self.host_peak_bytes = self.live_bytes, self.host_bytes

    def _add(self, nbytes: int, *, host: bool) -> None:
        if host:
            self.host_bytes += nbytes
            self.host_peak_bytes = max(self.host_peak_bytes, self.host_bytes)
        else:
            self.live_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _set(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = id(storage)
        if key in self._entries:
            reference, before, host = self._entries[key]
        else:
            reference, before = weakref.ref(storage, functools.partial(self._freed, key)), 0
            host = _on_host.get() or self._device_type not in (None, storage.device.type)
        self._entries[key] = (reference, nbytes, host)
        self._add(nbytes - before, host=host)

    def _freed(self, key: int, reference: weakref.ref[torch.UntypedStorage]) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry[0] is reference:
            del self._entries[key]
            self._add(-entry[1], host=entry[2])

    def _tracked(self, storage: torch.UntypedStorage) -> bool:
        return id(storage) in self._entries

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        # torch.tensor fills its storage outside the dispatcher and only then calls lift_fresh: that input is new.
        older = () if func is torch.ops.aten.lift_fresh.default else _storages((args, kwargs))
        inputs = {id(storage): (storage, int(storage.nbytes())) for storage in older}
        result = func(*args, **kwargs)
        for storage, before in inputs.values():
            now = int(storage.nbytes())
            if self._tracked(storage):
                self._set(storage, now)  # resize_, out= and UntypedStorage.resize_ change a storage in place
            elif now > before:
                self._set(storage, now - before)  # it was there before the block: only its growth is ours
        for storage in _storages(result):
            if id(storage) not in inputs and not self._tracked(storage):
                self._set(storage, int(storage.nbytes()))
        return result
