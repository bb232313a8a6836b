"""Steps, bytes and failures of one rival on one device."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from meft_kernels.comparison.rivals import Budget, Rival, UnavailableRivalError
from meft_kernels.estimate.step import tensor_bytes
from meft_kernels.memory import LiveTensorMeter
from meft_kernels.packages import MissingPackageError
from meft_kernels.patching.state import count_parameters

from .models import own, trained, twin
from .progress import Progress

T = TypeVar("T")

UNTIL = "MEFT_BENCHMARK_UNTIL"
"""Environment: the Unix time at which a worker should be done."""
START_AGAIN = 3
"""Exit status of a worker whose CUDA context is broken: another process can go on."""
LEARNING_RATE = 1e-5
DOES_NOT_FIT = "does not fit (OutOfMemoryError)"


def seconds_left() -> float:
    """Until this process should be done; endless for one that was started by hand."""
    until = os.environ.get(UNTIL)
    return float(until) - time.time() if until else float("inf")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what is no longer referred to; models have cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def warm_up_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Have cuBLAS take its workspaces, for forward's thread and for backward's, before anyone's bytes are counted."""
    layer = nn.Linear(64, 64, device=device, dtype=dtype)
    layer(torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)).sum().backward()
    synchronize(device)


class CudaMeter:
    """:class:`LiveTensorMeter`'s figures as CUDA's caching allocator has them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> CudaMeter:
        synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self._device)

    @property
    def live_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._before

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before


@dataclass
class Runner:
    """A rival that is ready to train, with its batch and its optimiser."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: dict[str, Any]
    device: torch.device

    @classmethod
    def of(cls, rival: Rival, base: nn.Module, budget: Budget, batch: dict[str, Any]) -> Runner:
        """A rival around the base's weights."""
        torch.manual_seed(2)
        device = next(base.parameters()).device
        model = rival.prepare(twin(base), budget).train()
        own(model, base)
        optimizer = torch.optim.AdamW(list(trained(model)), lr=LEARNING_RATE, fused=device.type == "cuda")
        return cls(model, optimizer, batch, device)

    def step(self, after_forward: Callable[[], None] = lambda: None) -> torch.Tensor:
        """Forward, backward, AdamW. Of what the model returns only the loss is held on to."""
        loss: torch.Tensor = self.model(**self.batch).loss
        after_forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def seconds(self, steps: int) -> float:
        """Per step, of several without a wait in between."""
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.device)
        return (time.perf_counter() - began) / steps

    def bytes(self) -> dict[str, int]:
        """Of one more step: all that is there besides the weights."""
        kept = []
        with CudaMeter(self.device) if self.device.type == "cuda" else LiveTensorMeter() as meter:
            self.step(lambda: kept.append(meter.live_bytes))
            peak = meter.peak_bytes
        states = sum(
            value.nbytes
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        return {"kept_bytes": kept[0], "peak_bytes": peak + states, "optimizer_bytes": states}

    def weights(self) -> dict[str, int]:
        """Trained parameters, and bytes of all weights; a shared one counts once."""
        weights = tensor_bytes([*self.model.parameters(), *self.model.buffers()])
        return {"trainable": count_parameters(self.model)[0], "weights_bytes": weights}


def attempt(progress: Progress, name: str, device: torch.device, work: Callable[[], T]) -> T | None:
    """Do ``work``; what it raises becomes the outcome of this item.

    The process ends here if the device is beyond use for it.
    """
    progress.start(name)
    try:
        return work()
    except torch.OutOfMemoryError:
        reason = DOES_NOT_FIT
    except (UnavailableRivalError, MissingPackageError) as error:
        reason = str(error)
    except Exception as error:  # whatever a rival does wrong, the others go on
        reason = f"{type(error).__name__}: {one_line(str(error))}"
    # Past the handler, because the traceback held on to the model.
    found = {key: value for key, value in progress.items.get(name, {}).items() if key != "unfinished"}
    progress.put(name, {**found, "reason": reason})
    print(f"  {name}: {reason}", flush=True)
    try:
        synchronize(device)
        release(device)
    except Exception as error:  # illegal memory accesses stay until the process ends
        print(f"  the device can no longer be used by this process: {one_line(str(error))}", flush=True)
        os._exit(START_AGAIN)  # tearing down would raise again, or hang
    return None


def one_line(text: str) -> str:
    """The first line, not endless."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:200]
