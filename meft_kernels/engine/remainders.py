"""What the inverse of a lane needs beside the streams, on the device or waiting in host memory."""

from __future__ import annotations

import logging
import weakref
from contextlib import suppress
from typing import Any

import torch

from ..memory import host_allocation
from ..notices import warn_once

logger = logging.getLogger(__name__)


class HostMemory:
    """Buffers in host memory for one stack's remainders, reused from step to step.

    From CUDA they are pinned, and a stream of its own copies to and from them: computation waits for a copy only where
    it has come to need what is still under way, and the host waits for none. On other devices they are plain tensors.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._streams: dict[torch.device, Any] = {}
        self._pins = True

    def __reduce__(self) -> tuple[Any, ...]:
        return HostMemory, ()  # buffers are neither copied nor pickled

    def put(self, tensor: torch.Tensor) -> HostCopy:
        """Begin to copy a tensor of bytes, which may be dropped at once."""
        buffer = self._buffer(tensor)
        if tensor.device.type == "cuda":
            stream = self._stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                buffer.copy_(tensor.view(-1), non_blocking=True)
            tensor.record_stream(stream)
        else:
            buffer.copy_(tensor.view(-1))
        return HostCopy(self, buffer, tensor.shape, tensor.device)

    def start(self, copy: HostCopy) -> Arriving:
        """Begin to copy back."""
        if copy.device.type != "cuda":
            return Arriving(copy.buffer.to(copy.device, copy=True).view(copy.shape), None)
        stream = self._stream(copy.device)
        with torch.cuda.stream(stream):
            tensor = torch.empty(copy.shape, dtype=torch.uint8, device=copy.device)
            tensor.view(-1).copy_(copy.buffer, non_blocking=True)
            return Arriving(tensor, stream.record_event())

    def give_back(self, buffer: torch.Tensor) -> None:
        """A buffer may be written to again: whatever does so comes after its reader on the same stream."""
        self._free.setdefault(buffer.numel(), []).append(buffer)

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        with suppress(KeyError, IndexError):  # asked first, another thread could take the last one meanwhile
            return self._free[like.numel()].pop()
        with host_allocation():
            if like.device.type == "cuda" and self._pins:
                try:
                    return torch.empty(like.numel(), dtype=torch.uint8, pin_memory=True)
                except RuntimeError as error:  # WSL, containers: the system caps what may be pinned
                    self._pins = False
                    reason = str(error).strip().splitlines()[0]
                    warn_once(
                        logger,
                        f"meft_kernels: host memory could not be pinned ({reason}); remainders wait in pageable "
                        "memory, which takes longer to copy",
                    )
            return torch.empty(like.numel(), dtype=torch.uint8)

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class HostCopy:
    """A tensor's bytes in host memory. Their buffer goes back when nobody holds this any more."""

    def __init__(self, memory: HostMemory, buffer: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
        self.memory, self.buffer, self.shape, self.device = memory, buffer, shape, device
        weakref.finalize(self, memory.give_back, buffer).atexit = False

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes


class Arriving:
    """A tensor on its way back to the device."""

    def __init__(self, tensor: torch.Tensor, event: Any) -> None:
        self._tensor, self._event = tensor, event

    def get(self) -> torch.Tensor:
        """The tensor, for the current stream, which waits for it."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._event)
            self._tensor.record_stream(stream)
        return self._tensor


class Remainders:
    """One lane's packed remainders, tile by tile; each can be taken once, in the order in which they were put.

    Attributes:
        host: where they wait, None for the device itself.
        next: those that backward will take when these are done.
    """

    def __init__(self, host: HostMemory | None, following: Remainders | None = None) -> None:
        self.host = host
        self.next = following
        self._held: list[torch.Tensor | HostCopy | Arriving | None] = []

    def put(self, remainder: torch.Tensor | None, times: int = 1) -> None:
        """Hold one more tile's; ``times`` is for simulations, which leave out tiles like this one."""
        for number in range(times):
            like = remainder if remainder is None or number == 0 else torch.empty_like(remainder)
            self._held.append(like if like is None or self.host is None else self.host.put(like))

    def drop(self, start: int, end: int) -> None:
        """Let go of those that nobody will take."""
        self._held[start:end] = [None] * max(0, min(end, len(self._held)) - start)

    def take(self, number: int) -> torch.Tensor | None:
        """The remainder of one tile, not held here any more; the next one sets out from host memory."""
        self._start(number)
        held, self._held[number] = self._held[number], None
        if self.host is not None:
            self._start(number + 1)
        if isinstance(held, Arriving):
            return held.get()
        assert not isinstance(held, HostCopy)
        return held

    def clear(self) -> None:
        self._held.clear()
        self.next = None

    def _start(self, number: int) -> None:
        if number >= len(self._held):
            if self.next is not None:
                self.next._start(0)
            return
        held = self._held[number]
        if isinstance(held, HostCopy):
            self._held[number] = held.memory.start(held)

    @property
    def nbytes(self) -> int:
        """Bytes held, on the device or in host memory."""
        return sum(held.nbytes for held in self._held if isinstance(held, torch.Tensor | HostCopy))
