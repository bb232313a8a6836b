"""One rival, one case, one seed: trained and measured. And all rivals of a case, timed in turns."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import MeftConfig
from ..errors import MeftError
from ..patching.state import count_parameters
from ..reports.verify import verify
from .cases import Case
from .labelled import LabelledTexts
from .loop import footprint, repeated_step, train
from .recipes import Recipe
from .records import Record
from .rivals import Budget, Rival
from .tasks import Task
from .texts import batch_indices
from .timing import interleaved

TRAINED, TIMED = "comparison", "step_time"
"""The kinds of these records."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is the same for every rival of a case."""

    case: Case
    task: Task
    recipe: Recipe
    config: MeftConfig
    dtype: torch.dtype
    device: torch.device
    train_texts: int | None = None
    lrs: dict[str, float] = dataclasses.field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Plain values, for a record."""
        recipe = dataclasses.asdict(self.recipe)
        for name in ("lr", "lora_lr", "meft"):  # a rival's own
            del recipe[name]
        return {"case": str(self.case), **recipe, "dtype": str(self.dtype), "train_texts": self.train_texts}

    def settings_of(self, rival: Rival, seed: int) -> dict[str, Any]:
        """Of one run."""
        return {**self.settings(), "rival": rival.name, "seed": seed, "lr": self.lrs.get(rival.name, rival.lr)}

    def path(self, out: Path, rival: str, seed: int) -> Path:
        """Where the record of a run goes; ``none`` is the model before training."""
        return out / self.case.folder / f"{rival}-{seed}.json"

    def timing_path(self, out: Path) -> Path:
        """Where the record of step times goes."""
        return out / self.case.folder / f"{TIMED}.json"

    def base(self, seed: int) -> nn.Module:
        """The pretrained model, on the CPU; ``seed`` is that of a new head."""
        return self.task.load(dtype=self.dtype, device=torch.device("cpu"), seed=seed)

    def prepared(self, base: nn.Module, budget: Budget, rival: Rival, seed: int) -> nn.Module:
        """A rival's own copy, ready to train."""
        torch.manual_seed(seed)
        return rival.prepare(copy.deepcopy(base).to(self.device), budget).train()

    def score(self, model: nn.Module, texts: LabelledTexts) -> float:
        """On the held-out texts; a language model's logits are large."""
        batch_size = 16 if self.task.causal else 64
        return self.task.score(model, texts.held_out, batch_size=batch_size, device=self.device)


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether the file has what these settings would give again.

    Raises:
        ValueError: it is no record.
    """
    return path.exists() and Record.read(path).settings == settings


def run(setup: Setup, rival: Rival, seed: int, on_step: Callable[[float], None] = lambda loss: None) -> Record:
    """Train one rival, and measure it. What goes wrong with a rival is its result: ``figures["failed"]``."""
    settings = setup.settings_of(rival, seed)
    try:
        figures = _figures(setup, rival, seed, settings["lr"], on_step)
    except (MeftError, ValueError, torch.OutOfMemoryError) as error:
        figures = {"failed": f"{type(error).__name__}: {error}"}
    return Record.now(TRAINED, settings, figures, setup.device)


def _figures(setup: Setup, rival: Rival, seed: int, lr: float, on_step: Callable[[float], None]) -> dict[str, Any]:
    task, recipe, device = setup.task, setup.recipe, setup.device
    texts = setup.case.texts(recipe, setup.train_texts, seed)
    batches = batch_indices(texts.train.texts, batch_size=recipe.batch_size, steps=recipe.steps, seed=seed)
    base = setup.base(seed)
    model = setup.prepared(base, Budget.of(base, setup.config), rival, seed)
    trainable = count_parameters(model)[0]
    batch = task.batch(texts.train, batches[0], device)
    torch.manual_seed(seed)  # the same dropout for every rival, as far as they draw alike
    began = time.perf_counter()
    training = train(model, task, texts.train, batches, recipe=recipe, lr=lr, device=device, on_step=on_step)
    seconds = time.perf_counter() - began
    size = footprint(model, batch)
    figures = {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "score": setup.score(model, texts),
        "trainable": trainable,
        "adapter_bytes": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "kept_bytes": size.kept,
        "peak_bytes": size.peak,
        "train_seconds": seconds,
        "seconds_per_step": training.seconds_per_step,
        "losses": training.losses,
    }
    if rival.reversible:
        report = verify(model, batch)
        figures |= {"bit_exact": report.bit_exact, "gradient_error": report.gradient_error}
    return figures


def before(setup: Setup, seed: int) -> Record:
    """The pretrained model's own score, and the head's first guess."""
    texts = setup.case.texts(setup.recipe, setup.train_texts, seed)
    model = setup.base(seed).to(setup.device)
    score = setup.score(model, texts)
    figures = {"metric": setup.task.metric, "higher_is_better": setup.task.higher_is_better, "score": score}
    return Record.now(TRAINED, settings_before(setup, seed), figures, setup.device)


def settings_before(setup: Setup, seed: int) -> dict[str, Any]:
    """Of :func:`before`."""
    return {**setup.settings(), "rival": "none", "seed": seed, "lr": 0.0}


def time_rivals(
    setup: Setup, rivals: list[Rival], *, rounds: int, on_round: Callable[[], object] = lambda: None
) -> Record:
    """Whole training steps (forward, backward, clipping, AdamW) of all rivals in turns, on the case's first batch."""
    texts = setup.case.texts(setup.recipe, setup.train_texts, 0)
    indices = batch_indices(texts.train.texts, batch_size=setup.recipe.batch_size, steps=1, seed=0)[0]
    batch = setup.task.batch(texts.train, indices, setup.device)
    base = setup.base(0)
    budget = Budget.of(base, setup.config)
    steps, failed = {}, {}
    for rival in rivals:
        try:
            model = setup.prepared(base, budget, rival, 0)
            steps[rival.name] = repeated_step(model, batch, setup.recipe.max_grad_norm)
        except (MeftError, torch.OutOfMemoryError) as error:
            failed[rival.name] = f"{type(error).__name__}: {error}"
    times = interleaved(steps, rounds=rounds, device=setup.device, on_round=on_round)
    tokens = int(batch["attention_mask"].sum())
    figures = {"seconds": times.seconds, "medians": times.medians, "failed": failed, "tokens": tokens}
    settings = timing_settings(setup, rivals, rounds)
    return Record.now(TIMED, settings, figures, setup.device)


def timing_settings(setup: Setup, rivals: list[Rival], rounds: int) -> dict[str, Any]:
    """Of :func:`time_rivals`."""
    return {**setup.settings(), "rivals": [rival.name for rival in rivals], "rounds": rounds}
