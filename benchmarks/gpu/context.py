"""The longest sequence of which a training step fits: doubled until one does not, and then to a quarter."""

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
    tokens, steps = settings["from"], list[dict[str, Any]]()
    runner = Runner.of(RIVALS[name], base, budget, batch_of(base, 1, tokens, loss_on=settings["loss_on"]))
    runner.step()  # calibrates, compiles
    fits, too_long = 0, 0
    while True:
        runner.batch = batch_of(base, 1, tokens, loss_on=settings["loss_on"])
        try:
            found = runner.bytes()
            took = runner.seconds(1)
        except torch.OutOfMemoryError:
            too_long = tokens
        else:
            fits = tokens
            steps.append({"tokens": tokens, "seconds": took, "tokens_per_second": tokens / took, **found})
            progress.put(name, {"longest": fits, "steps": steps, "unfinished": True})
            progress.start(name)
        runner.optimizer.zero_grad(set_to_none=True)
        release(device)
        if not fits:
            raise torch.OutOfMemoryError(f"{tokens} tokens do not fit")
        if too_long and 4 * (too_long - fits) <= fits:
            stopped = f"{too_long} tokens do not fit"
            break
        tokens = (fits + too_long) // 2 if too_long else 2 * fits
        if tokens > settings["to"]:
            stopped = f"{tokens} tokens were not tried"
            break
        if seconds_left() < 10 * took:  # two steps, of up to four times the work
            stopped = f"no time for {tokens} tokens"
            break
    outcome = {"longest": fits, "steps": steps, "stopped": stopped, **runner.weights()}
    # Where time ran out, a run with more of it goes further.
    return {**outcome, "unfinished": True} if stopped.startswith("no time") else outcome
