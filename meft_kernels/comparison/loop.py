"""The training loop, the same for every method."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..memory import LiveTensorMeter
from .labelled import Split
from .recipes import Recipe
from .tasks import Batch, Task


@dataclass(frozen=True)
class Training:
    """What one run of :func:`train` measured."""

    losses: list[float]
    seconds_per_step: float


@dataclass(frozen=True)
class Footprint:
    """Bytes of tensors in one training step; the weights, which were there before, are not in them."""

    kept: int
    peak: int


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear from 0 to 1 over the first part of the run, and linear back to 0."""
    rising = max(1, round(warmup * steps))
    return (step + 1) / rising if step < rising else max(0.0, (steps - step) / max(1, steps - rising))


def train(
    model: nn.Module,
    task: Task,
    split: Split,
    batches: list[list[int]],
    *,
    recipe: Recipe,
    lr: float,
    device: torch.device,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Training:
    """AdamW over ``batches``; ``on_step`` is told each loss. Seconds per step are the median, data included."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1]
    rest = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, len(batches), recipe.warmup)
    )
    losses, seconds = [], []
    model.train()
    for indices in batches:
        began = time.perf_counter()
        loss = model(**task.batch(split, indices, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device, so the clock below is right
        seconds.append(time.perf_counter() - began)
        if losses[-1] != losses[-1]:
            raise ValueError(f"the loss is NaN after {len(losses)} steps: lower the learning rate ({lr:g})")
        on_step(losses[-1])
    return Training(losses=losses, seconds_per_step=statistics.median(seconds))


def repeated_step(model: nn.Module, batch: Batch, max_grad_norm: float) -> Callable[[], None]:
    """A training step for timing: forward, backward, clipping, AdamW at rate 0, so that all rounds do the same."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def step() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def footprint(model: nn.Module, batch: Batch) -> Footprint:
    """Tensors alive after the forward of one training step, and the most during the step."""
    was_training = model.training
    model.train()
    with LiveTensorMeter(next(model.parameters()).device) as meter:
        # The logits and whatever else the model returns are no activations that backward needs: only the loss is kept.
        loss = model(**batch).loss
        kept = meter.live_bytes
        loss.backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return Footprint(kept=kept, peak=meter.peak_bytes)
