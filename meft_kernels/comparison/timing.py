"""Times of training steps, rivals taking turns, so that a machine whose speed drifts treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of every round, by name."""

    seconds: dict[str, list[float]]

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    def ratios(self, to: str) -> dict[str, float]:
        """Median over rounds of each one's time over that of ``to`` in the same round."""
        return {
            name: statistics.median(a / b for a, b in zip(values, self.seconds[to], strict=True))
            for name, values in self.seconds.items()
        }


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done what ``step`` asks of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
    on_round: Callable[[], object] = lambda: None,
) -> Times:
    """One step of each a round; the first ``warm_up`` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(warm_up + rounds):
        for name, step in steps.items():
            taken = seconds_of(step, device)
            if round_ >= warm_up:
                seconds[name].append(taken)
        on_round()
    return Times(seconds)
