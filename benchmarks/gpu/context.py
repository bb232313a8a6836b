"""The longest sequence of which a training step fits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS, Budget, UnavailableRivalError

from .measure import Runner, attempt, release, seconds_left, warm_up_libraries
from .models import batch_of, build
from .progress import Progress

RIVALS_HERE = ("lora_checkpointing", "meft")


def run(progress: Progress, device: torch.device) -> None:
    """One rival after the other, each alone with the base's weights."""
    settings = progress.piece.settings
    dtype = getattr(torch, settings["dtype"])
    base = build(settings["model"], device, dtype, tiny=settings["tiny"])
    warm_up_libraries(device, dtype)
    budget = Budget.of(base, MeftConfig(rank=settings["rank"], adapter_dtype="model"))
    for name in progress.pending():
        outcome = attempt(progress, name, device, lambda name=name: _longest(name, progress, base, budget))  # type: ignore[misc]
        if outcome is not None:
            progress.put(name, outcome)
        release(device)


def _longest(name: str, progress: Progress, base: nn.Module, budget: Budget) -> dict[str, Any]:
    settings = progress.piece.settings
    device = next(base.parameters()).device
    if reason := RIVALS[name].why_unavailable(device):
        raise UnavailableRivalError(reason)
    tokens, steps, took = settings["from"], list[dict[str, Any]](), 0.0
    runner = Runner.of(RIVALS[name], base, budget, batch_of(base, 1, tokens, loss_on=settings["loss_on"]))
    runner.step()  # calibrates, compiles
    while True:
        runner.batch = batch_of(base, 1, tokens, loss_on=settings["loss_on"])
        try:
            found = runner.bytes()
            took = runner.seconds(1)
        except torch.OutOfMemoryError:
            stopped = f"{tokens} tokens do not fit"
            break
        steps.append({"tokens": tokens, "seconds": took, "tokens_per_second": tokens / took, **found})
        outcome = {"longest": tokens, "steps": steps, **runner.weights()}
        progress.put(name, {**outcome, "unfinished": True})
        progress.start(name)
        release(device)
        tokens *= 2
        if tokens > settings["to"]:
            stopped = f"{tokens} tokens were not tried"
            break
        if seconds_left() < 10 * took:  # two steps, of up to four times the work
            stopped = f"no time for {tokens} tokens"
            break
    if not steps:
        raise torch.OutOfMemoryError(stopped)
    # Where time ran out, a run with more of it goes further.
    return {**outcome, "stopped": stopped, **({"unfinished": True} if stopped.startswith("no time") else {})}
