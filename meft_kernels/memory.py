"""A meter for the bytes of live tensors, exact to the byte and the same on every device."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """The storages behind every tensor in nested ``values``, those inside wrapper subclasses too."""
    for value in tree_iter(values):
        if not isinstance(value, torch.Tensor):
            continue
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages([getattr(value, name) for name in names])
        else:
            try:
                yield value.untyped_storage()
            except NotImplementedError:  # sparse layouts have none
                continue


@contextlib.contextmanager
def host_allocation() -> Iterator[None]:
    """Stand-in until merged."""
    yield


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

    Attributes:
        live_bytes: bytes alive now.
        peak_bytes: the highest ``live_bytes`` since the block began, or since :meth:`reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        # By id of the storage's Python object: torch keeps that object as long as the storage lives, and the weakref's
        # callback takes the entry out before the id can be used again.
        self._entries: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.live_bytes

    def _set(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = id(storage)
        reference, before = self._entries.get(key, (None, 0))
        if reference is None:
            reference = weakref.ref(storage, functools.partial(self._freed, key))
        self._entries[key] = (reference, nbytes)
        self.live_bytes += nbytes - before
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _freed(self, key: int, reference: weakref.ref[torch.UntypedStorage]) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry[0] is reference:
            del self._entries[key]
            self.live_bytes -= entry[1]

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
