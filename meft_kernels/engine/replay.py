"""What a branch must find unchanged when it is computed a second time: autocast and random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run a block under this state."""
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


def draw_seed() -> int:
    """A seed from the global generator, so that ``torch.manual_seed`` decides it."""
    return int(torch.randint(2**62, (), dtype=torch.int64))


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Run a block with its own random numbers and put the global generators back; ``None`` changes nothing.

    One seed for a whole forward, from which each branch derives its own, costs 8 bytes; saving the CPU generator's
    state for each branch would cost 5 KB twice a layer.
    """
    if seed is None:
        yield
        return
    on_device = device.type != "cpu"
    with torch.random.fork_rng(devices=[device] if on_device else [], device_type=device.type if on_device else "cuda"):
        torch.default_generator.manual_seed(seed)
        if on_device:
            module = torch.get_device_module(device)
            module.default_generators[device.index or 0].manual_seed(seed)
        yield


@contextmanager
def other_generators_kept() -> Iterator[None]:
    """Run a block and put NumPy's and Python's global generators back, which speech models draw their masks from."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)
