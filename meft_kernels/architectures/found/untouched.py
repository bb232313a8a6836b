"""Running a model to look at it, so that it is afterwards as it was before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ...rollback import all_or_nothing


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a block that calls the model; whatever that changes of it is put back, an error or not.

    That is all that a change which failed puts back (hooks, modes, a layer's own state), the values of all buffers, and
    the random numbers of torch, NumPy and Python.
    """
    before = all_or_nothing(model)
    before.keep(model.buffers())
    numbers = np.random.get_state(), random.getstate()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    on_device = device.type not in ("cpu", "meta")
    try:
        with torch.random.fork_rng(
            devices=[device] if on_device else [], device_type=device.type if on_device else "cuda"
        ):
            yield
    finally:
        np.random.set_state(numbers[0])
        random.setstate(numbers[1])
        before.restore()
