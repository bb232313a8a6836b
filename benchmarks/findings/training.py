"""One short training of the classifier, from a start that may have been moved: the job that most findings share."""

from __future__ import annotations

import copy
import functools
import json
import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.start_loss import hidden_states
from meft_kernels import MeftConfig, NonFiniteError, StreamOverflowError, describe
from meft_kernels.comparison.labelled import LabelledTexts
from meft_kernels.comparison.loop import footprint, train
from meft_kernels.comparison.recipes import Recipe, recipe_for
from meft_kernels.comparison.records import Record
from meft_kernels.comparison.rivals import RIVALS, Budget
from meft_kernels.comparison.tasks import Task
from meft_kernels.comparison.texts import batch_indices, load_texts
from meft_kernels.patching.state import find_state

from .shared import CPU, Job, Sizes

KIND = "finding-training"
_MOVED = {"lora": "lora_B", "ia3": "ia3_l"}
"""What of a rival decides how far its start is from the pretrained model."""


def job(sizes: Sizes, label: str, method: str, seed: int, config: dict[str, Any], moved: float = 0.0) -> Job:
    """``config`` says what differs from the defaults; ``moved`` is the std of noise added to where training starts."""
    recipe = recipe_for(causal=False)
    settings = {
        "model": sizes.classifier,
        "data": sizes.data,
        "method": method,
        "config": {"rank": recipe.rank, **recipe.meft, **config},
        "moved": moved,
        "seed": seed,
        "steps": sizes.steps,
        "batch_size": sizes.batch_size,
        "max_length": sizes.max_length,
        "held_out": sizes.held_out,
        "lr": RIVALS[method].lr,
    }
    return Job(KIND, f"{label}-{seed}", settings, measure)


def runs(records: list[Record], method: str, moved: float | None = None, **config: Any) -> list[Record]:
    """The trainings (one for each seed) of this method and these settings."""
    return [
        record
        for record in records
        if record.kind == KIND
        and record.settings["method"] == method
        and (moved is None or record.settings["moved"] == moved)
        and all(record.settings["config"].get(name) == value for name, value in config.items())
    ]


@functools.cache
def _task(model: str, max_length: int) -> Task:
    return Task(model, ("negative", "positive"), max_length=max_length)


@functools.cache
def _texts(data: str, held_out: int, seed: int) -> LabelledTexts:
    return load_texts(data, held_out=held_out, seed=seed)


@functools.cache
def _base(task: Task, seed: int) -> nn.Module:
    return task.load(dtype=torch.float32, device=CPU, seed=seed)


@functools.cache
def _budget(base: nn.Module, settings: str) -> Budget:
    return Budget.of(base, MeftConfig.from_dict(json.loads(settings)))


def move(model: nn.Module, method: str, std: float) -> None:
    """Add noise to what a rival starts with: LoRA's B, which is 0, or the factors of (IA)3, which are 1."""
    moved = [p for name, p in model.named_parameters() if _MOVED[method] in name and p.requires_grad]
    if not moved:
        raise ValueError(f"{method} has no {_MOVED[method]} that could be moved")
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(torch.randn_like(parameter), alpha=std)


def prepared(settings: dict[str, Any]) -> tuple[nn.Module, Task, LabelledTexts, Recipe]:
    """The model ready to train, and what it is trained on."""
    seed, method, moved = settings["seed"], settings["method"], settings["moved"]
    task = _task(settings["model"], settings["max_length"])
    base = _base(task, seed)
    budget = _budget(base, json.dumps(settings["config"]))
    torch.manual_seed(seed)
    model = RIVALS[method].prepare(copy.deepcopy(base), budget)
    if moved:
        move(model, method, moved)
    return model, task, _texts(settings["data"], settings["held_out"], seed), recipe_for(causal=False)


def distance(moved: torch.Tensor, pretrained: torch.Tensor) -> float:
    return float((moved - pretrained).norm() / pretrained.norm())


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Start, training, accuracy. Training that ends in NaN or overflow has no accuracy, and says why."""
    model, task, data, recipe = prepared(settings)
    batch = task.batch(data.held_out, list(range(min(64, len(data.held_out)))), CPU)
    base = _base(task, settings["seed"]).eval()
    model.eval()
    with torch.no_grad():
        figures: dict[str, Any] = {
            "start_distance": distance(hidden_states(model, batch), hidden_states(base, batch)),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
    steps, size = settings["steps"], settings["batch_size"]
    batches = batch_indices(data.train.texts, batch_size=size, steps=steps, seed=settings["seed"])
    figures["kept_bytes"] = footprint(model, task.batch(data.train, batches[0], CPU)).kept
    if find_state(model) is not None:
        figures["bits_per_element"] = describe(model).stacks[0].bits_per_element
    losses: list[float] = []
    torch.manual_seed(settings["seed"])  # the same dropout for every method, as far as they draw alike
    try:
        trained = train(
            model, task, data.train, batches, recipe=recipe, lr=settings["lr"], device=CPU, on_step=losses.append
        )
        accuracy = task.score(model, data.held_out, batch_size=64, device=CPU)
        figures |= {"accuracy": accuracy, "seconds_per_step": trained.seconds_per_step, "stopped": None}
    except (NonFiniteError, StreamOverflowError) as error:
        figures |= {"accuracy": None, "stopped": f"after {len(losses)} steps: {error}"}
    except ValueError as error:
        if "the loss is NaN" not in str(error):
            raise
        figures |= {"accuracy": None, "stopped": str(error)}
    last = losses[-max(1, steps // 4) :]
    figures["loss_at_the_end"] = statistics.fmean(last) if last else None
    figures["losses"] = [round(loss, 4) for loss in losses]
    return figures
