"""The outcomes of a demo as a table, a plot and a JSON file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ...comparison.rivals import RIVALS
from ...comparison.tables import MIB, smooth, spread
from ...packages import require
from .run import Demo, Outcome


def _verdict(values: list[bool | None], good: str, bad: str) -> str:
    known = [value for value in values if value is not None]
    return "-" if not known else good if all(known) else bad


def _exactness(runs: list[Outcome]) -> str:
    """The engine raises at the first layer that is not rebuilt bit for bit, so a finished run was exact throughout."""
    if runs[0].bit_exact is None:
        return "-"
    return f"exact, {sum(len(run.losses) for run in runs)} steps" if all(run.bit_exact for run in runs) else "not exact"


_ROWS: list[tuple[str, Callable[[list[Outcome]], str]]] = [
    ("accuracy before, %", lambda runs: spread([run.accuracy_before for run in runs], ".1f")),
    ("accuracy after, %", lambda runs: spread([run.accuracy_after for run in runs], ".1f")),
    ("trainable parameters", lambda runs: f"{runs[0].trainable:,}"),
    ("rank", lambda runs: str(runs[0].rank)),
    ("learning rate", lambda runs: f"{runs[0].lr:g}"),
    ("activations kept, MiB", lambda runs: spread([run.kept_bytes / MIB for run in runs], ".1f")),
    ("peak of a step, MiB", lambda runs: spread([run.peak_bytes / MIB for run in runs], ".1f")),
    ("seconds per step", lambda runs: spread([run.seconds_per_step for run in runs], ".3f")),
    ("rebuilt bit for bit", _exactness),
    (
        "gradient error",
        lambda runs: "-" if runs[0].gradient_error is None else f"{max(run.gradient_error or 0 for run in runs):.1e}",
    ),
    (
        "same logits, reloaded",
        lambda runs: _verdict([run.same_after_reload for run in runs], "yes, every bit", "NO"),
    ),
]


def by_method(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of the same method together, in the order of the methods' first outcome."""
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.method, []).append(outcome)
    return grouped


def table(demo: Demo, outcomes: list[Outcome]) -> Table:
    """One column a method; figures of several seeds as mean and standard deviation."""
    seeds = f", mean ± std of {len(demo.seeds)} seeds" if len(demo.seeds) > 1 else ""
    recipe = demo.recipe
    made = Table(
        title=f"{demo.model} on {demo.data}: {recipe.steps} steps of {recipe.batch_size}{seeds}",
        caption=(
            f"accuracy: on {recipe.held_out} held-out texts; activations kept: live tensors after the forward of one "
            "training batch, the same for every method; gradient error: relative, to plain autograd"
        ),
    )
    made.add_column()
    grouped = by_method(outcomes)
    for method in grouped:
        name = f"{RIVALS[method].title} ({demo.config.variant})" if method == "meft" else RIVALS[method].title
        made.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for label, cell in _ROWS:
        made.add_row(label, *(cell(runs) for runs in grouped.values()))
    return made


def write_json(demo: Demo, outcomes: list[Outcome], path: Path) -> None:
    """Settings, versions and every figure, so that a run can be compared with another."""
    import transformers

    document: dict[str, Any] = {
        "settings": demo.settings(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")


def plot(demo: Demo, outcomes: list[Outcome], path: Path) -> None:
    """Loss curves (mean over seeds) and memory bars, as PNG."""
    require("matplotlib")
    from matplotlib.figure import Figure  # no pyplot: no global state, no display needed

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, memory = figure.subplots(1, 2)
    grouped = by_method(outcomes)
    for position, (method, runs) in enumerate(grouped.items()):
        curve = [statistics.fmean(step) for step in zip(*(run.losses for run in runs), strict=True)]
        # Checkpointing does not change what LoRA learns: dashed, so that the curve below it shows.
        (line,) = losses.plot(
            smooth(curve, max(1, len(curve) // 10)), "--" if RIVALS[method].dashed else "-", label=RIVALS[method].title
        )
        for offset, value, alpha in ((-0.2, runs[0].kept_bytes, 1.0), (0.2, runs[0].peak_bytes, 0.45)):
            bars = memory.bar(position + offset, value / MIB, 0.38, color=line.get_color(), alpha=alpha)
            memory.bar_label(bars, fmt="%.1f")
    losses.set(xlabel="step", ylabel="training loss, running mean", title=f"{demo.model} on {demo.data}")
    losses.legend()
    names = [RIVALS[method].title.replace(" + ", " +\n") for method in grouped]
    memory.set_xticks(range(len(grouped)), names)
    memory.set(ylabel="MiB", title="one training step: kept after forward, and peak (pale)")
    figure.savefig(path, dpi=120)
