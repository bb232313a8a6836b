"""Running a model to look at it, so that it is afterwards as it was before."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ...modules import modules_of


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a block that calls the model; whatever that changes of it is put back, an error or not.

    That is every module's attributes and what its dicts and lists hold (hooks, buffers, modes, a layer's own state),
    the values of all buffers, and the random numbers of torch, NumPy and Python. Not gradients: nothing here
    accumulates any.
    """
    attributes = [(module, dict(vars(module))) for module in modules_of(model)]
    held = [value for _, values in attributes for value in values.values()]
    containers = [(value, copy.copy(value)) for value in held if isinstance(value, dict | list | set)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
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
        for container, content in containers:
            if container != content if isinstance(container, set) else _differs(container, content):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for module, values in attributes:
            here = vars(module)
            for name in here.keys() - values.keys():
                del here[name]
            here.update(values)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _differs(container: Any, content: Any) -> bool:
    """Whether it holds other objects than it did; its values are not compared, which may be tensors."""
    if isinstance(container, list):
        return list(map(id, container)) != list(map(id, content))
    return [(key, id(value)) for key, value in container.items()] != [(k, id(v)) for k, v in content.items()]
