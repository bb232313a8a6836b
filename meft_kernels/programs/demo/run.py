"""One demonstration from the first download to the last check: what ``meft-kernels demo`` calls."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoint.load import load_adapter
from ...checkpoint.save import save_adapter
from ...comparison.labelled import LabelledTexts
from ...comparison.loop import footprint, train
from ...comparison.recipes import Recipe
from ...comparison.rivals import RIVALS, Budget
from ...comparison.tasks import Task
from ...comparison.texts import batch_indices, load_texts
from ...config import MeftConfig
from ...patching.state import count_parameters
from ...reports.verify import verify
from ..training.progress import progress

METHODS = ("meft", "lora", "lora_checkpointing")


@dataclass(frozen=True)
class Outcome:
    """One method, one seed."""

    method: str
    seed: int
    lr: float
    rank: int
    trainable: int
    accuracy_before: float
    accuracy_after: float
    kept_bytes: int
    peak_bytes: int
    seconds_per_step: float
    losses: list[float] = field(repr=False)
    bit_exact: bool | None = None  # MEFT only
    gradient_error: float | None = None
    same_after_reload: bool | None = None

    def line(self) -> str:
        """The outcome in a line, for logs of long runs."""
        accuracy = f"held-out accuracy {self.accuracy_before:.1f} -> {self.accuracy_after:.1f} %"
        return f"{RIVALS[self.method].title}, seed {self.seed}: {accuracy}, {self.seconds_per_step:.2f} s/step"


@dataclass(frozen=True)
class Demo:
    """What to run. ``recipe`` and ``config`` are complete: nothing is decided later."""

    model: str
    data: str
    recipe: Recipe
    config: MeftConfig
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0,)
    out: Path = Path("meft-demo")
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    train_texts: int | None = None

    def settings(self) -> dict[str, Any]:
        """Plain values, for the JSON of results."""
        plain = dataclasses.asdict(self)
        plain |= {"out": str(self.out), "dtype": str(self.dtype), "device": str(self.device)}
        return plain


def run_demo(demo: Demo, task: Task, on_outcome: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Train every method with every seed, and tell ``on_outcome`` of each.

    The first seed's MEFT adapter is saved under ``demo.out/adapter``.
    """
    outcomes = []
    for seed in demo.seeds:
        recipe = demo.recipe
        data = load_texts(demo.data, held_out=recipe.held_out, train=demo.train_texts, seed=seed)
        batches = batch_indices(data.train.texts, batch_size=recipe.batch_size, steps=recipe.steps, seed=seed)
        base = task.load(dtype=demo.dtype, device=torch.device("cpu"), seed=seed)
        before = _accuracy(demo, task, copy.deepcopy(base).to(demo.device), data)
        budget = Budget.of(base, demo.config)
        for method in demo.methods:
            torch.manual_seed(seed)
            model = RIVALS[method].prepare(copy.deepcopy(base).to(demo.device), budget)
            lora = getattr(model, "peft_config", {}).get("default")
            rank = demo.config.rank if lora is None else lora.r
            outcomes.append(_train_one(demo, method, seed, rank, task, model, data, batches, before))
            on_outcome(outcomes[-1])
    return outcomes


def _train_one(
    demo: Demo,
    method: str,
    seed: int,
    rank: int,
    task: Task,
    model: nn.Module,
    data: LabelledTexts,
    batches: list[list[int]],
    before: float,
) -> Outcome:
    lr = demo.recipe.lr if method == "meft" else demo.recipe.lora_lr
    batch = task.batch(data.train, batches[0], demo.device)
    title = RIVALS[method].title + (f", seed {seed}" if len(demo.seeds) > 1 else "")
    torch.manual_seed(seed)  # the same dropout for every method, as far as they draw alike
    with progress(title, len(batches)) as on_step:
        training = train(
            model, task, data.train, batches, recipe=demo.recipe, lr=lr, device=demo.device, on_step=on_step
        )
    size = footprint(model, batch)
    outcome = Outcome(
        method=method,
        seed=seed,
        lr=lr,
        rank=rank,
        trainable=count_parameters(model)[0],
        accuracy_before=before,
        accuracy_after=_accuracy(demo, task, model, data),
        kept_bytes=size.kept,
        peak_bytes=size.peak,
        seconds_per_step=training.seconds_per_step,
        losses=training.losses,
    )
    if method != "meft":
        return outcome
    report = verify(model, batch)
    return dataclasses.replace(
        outcome,
        bit_exact=report.bit_exact,
        gradient_error=report.gradient_error,
        same_after_reload=_same_after_reload(demo, task, model, data) if seed == demo.seeds[0] else None,
    )


def _accuracy(demo: Demo, task: Task, model: nn.Module, data: LabelledTexts) -> float:
    return task.score(model, data.held_out, batch_size=64, device=demo.device)


def _same_after_reload(demo: Demo, task: Task, model: nn.Module, data: LabelledTexts) -> bool:
    """Save, load into a fresh model (whose new head, if any, starts elsewhere), compare logits bit for bit."""
    folder = demo.out / "adapter"
    save_adapter(model, str(folder))
    fresh = load_adapter(task.load(dtype=demo.dtype, device=demo.device), str(folder))
    batch = task.batch(data.held_out, list(range(min(16, len(data.held_out)))), demo.device)
    model.eval()
    fresh.eval()
    with torch.no_grad():
        return torch.equal(model(**batch).logits, fresh(**batch).logits)
