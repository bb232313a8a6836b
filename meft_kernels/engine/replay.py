"""What a branch must find unchanged when it is computed a second time: autocast and random numbers."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class AutocastState:
    """Autocast as it was in forward. Backward runs outside of the user's ``with torch.autocast`` block."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]
    cache_enabled: bool

    @classmethod
    def capture(cls, device: torch.device) -> AutocastState:
        """The state now, for ``device`` and for the CPU (a layer may compute masks or positions there)."""
        settings = []
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                settings.append((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))
        return cls(tuple(settings), torch.is_autocast_cache_enabled())

    @property
    def is_in_force(self) -> bool:
        """Whether autocast is so now."""
        now = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind, _, _ in self.settings]
        return now == [*self.settings] and torch.is_autocast_cache_enabled() == self.cache_enabled

    def restored(self) -> AbstractContextManager[None]:
        """For a block, this state."""
        return nullcontext() if self.is_in_force else self._put_back()

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in self.settings:
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache_enabled)
                )
            yield


def no_leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor as one that was computed, which is what a layer is given without us.

    Autocast takes leaves for weights and keeps what it casts them to: until its block ends, and with the gradients of
    all uses (queries, keys, values) added up in 16 bits.
    """
    return tensor.view_as(tensor)


class _Drawn(threading.local):
    """Seeds drawn in the block of :func:`seeded` that this thread is in: its own, and how many."""

    seed: int | None = None
    count = 0


_drawn = _Drawn()
_WORD = 2**64 - 1


def derived_seed(seed: int, number: int) -> int:
    """One of the seeds that follow from another one: splitmix64, which gives neighbours nothing in common."""
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return (x ^ (x >> 31)) >> 2


def draw_seed() -> int:
    """A seed that follows from that of the block of :func:`seeded` around it, the same ones in the same order.

    Elsewhere one from the global generator, so that ``torch.manual_seed`` decides it.
    """
    if _drawn.seed is None:
        return int(torch.randint(2**62, (), dtype=torch.int64))
    _drawn.count += 1
    return derived_seed(_drawn.seed, _drawn.count - 1)


def first_drawn(seed: int | None) -> int:
    """What :func:`draw_seed` would give first in a block of this seed."""
    return draw_seed() if seed is None else derived_seed(seed, 0)


class seeded:
    """Run a block with its own random numbers and put the global generators back; ``None`` changes nothing.

    One seed for a whole forward, from which each branch derives its own, costs 8 bytes; saving the CPU generator's
    state for each branch would cost 5 KB twice a layer. What ``torch.random.fork_rng`` does, without its detours.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._seed = seed
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self._device = device

    def __enter__(self) -> None:
        if self._seed is None:
            return
        generators = [torch.default_generator]
        if self._device.type != "cpu":
            generators.append(torch.get_device_module(self._device).default_generators[self._device.index or 0])
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._before = _drawn.seed, _drawn.count
        _drawn.seed, _drawn.count = self._seed, 0
        torch.default_generator.manual_seed(self._seed)
        for generator in generators[1:]:
            generator.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        if self._seed is None:
            return
        _drawn.seed, _drawn.count = self._before
        for generator, state in self._generators:
            generator.set_state(state)


@contextmanager
def other_generators_kept() -> Iterator[None]:
    """Run a block and put NumPy's and Python's global generators back, which speech models draw their masks from."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)
