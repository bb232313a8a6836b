"""Records of a comparison as one table a case, for the terminal and for Markdown, and as Pareto plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..packages import require
from .records import Record
from .rivals import RIVALS
from .runs import TIMED, TRAINED

MIB = 2**20
BASELINE = "lora_checkpointing"
"""What step times are told relative to: it is what people use to save memory."""


@dataclass
class Row:
    """One rival in one case, over its seeds."""

    rival: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    step: float | None = None
    ratio: float | None = None

    @property
    def title(self) -> str:
        return "before training" if self.rival == "none" else RIVALS[self.rival].title

    def values(self, name: str) -> list[float]:
        return [run[name] for run in self.runs if name in run]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.fmean(values) if values else None


def rows_by_case(records: Iterable[Record]) -> dict[str, list[Row]]:
    """Every case's rows, in the order of the rivals' registry."""
    cases: dict[str, dict[str, Row]] = {}
    for record in records:
        rows = cases.setdefault(record.settings["case"], {})
        if record.kind == TRAINED:
            row = rows.setdefault(record.settings["rival"], Row(record.settings["rival"]))
            if "failed" in record.figures:
                row.failures.append(record.figures["failed"])
            else:
                row.runs.append(record.figures)
        elif record.kind == TIMED:
            for name, seconds in record.figures["seconds"].items():
                row = rows.setdefault(name, Row(name))
                row.step = record.figures["medians"][name]
                baseline = record.figures["seconds"].get(BASELINE)
                if baseline:
                    row.ratio = statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))
    order = ["none", *RIVALS]
    return {case: sorted(rows.values(), key=lambda row: order.index(row.rival)) for case, rows in cases.items()}


def spread(values: list[float], form: str) -> str:
    """Mean; with several seeds the sample standard deviation too."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def smooth(values: list[float], window: int) -> list[float]:
    """A running mean: single batches are too noisy to compare by eye."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mib(row: Row, name: str) -> str:
    value = row.mean(name)
    return "-" if value is None else format(value / MIB, ".1f")


def _training_seconds(row: Row) -> float | None:
    """All steps at the speed of the interleaved ones: the runs themselves may be hours apart, on a busy machine."""
    steps = [len(run["losses"]) for run in row.runs if "losses" in run]
    return row.step * statistics.fmean(steps) if row.step is not None and steps else None


def _exactness(row: Row) -> str:
    known = [run for run in row.runs if "bit_exact" in run]
    if not known:
        return "-"
    error = max(run["gradient_error"] for run in known)
    return f"{'yes' if all(run['bit_exact'] for run in known) else 'no'}, {error:.0e}"


_COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("trained", lambda row: row.title),
    (
        "{score}",
        lambda row: spread(row.values("score"), ".1f" if _higher_is_better([row]) else ".3f"),
    ),
    ("seeds", lambda row: str(len(row.runs)) if row.runs else "-"),
    ("parameters", lambda row: _number(row.mean("trainable"), ",.0f")),
    ("adapter, MiB", lambda row: _mib(row, "adapter_bytes")),
    ("kept, MiB", lambda row: _mib(row, "kept_bytes")),
    ("peak, MiB", lambda row: _mib(row, "peak_bytes")),
    ("training, s", lambda row: _number(_training_seconds(row), ".0f")),
    ("step, s", lambda row: _number(row.step, ".3f")),
    ("step / checkpointing", lambda row: _number(row.ratio, ".2f")),
    ("exact, gradient error", _exactness),
]

CAPTION = (
    "kept: live tensors after the forward of one training batch; peak: the most during the step, gradients included, "
    "weights not; step and its ratio to LoRA + checkpointing: medians of interleaved steps, AdamW included; training: "
    "all steps at that speed"
)


_SCORES = {"accuracy": "accuracy, %", "correlation": "correlation, x 100", "loss": "loss, nats a token"}


def _score_name(rows: list[Row]) -> str:
    return next((_SCORES[run["metric"]] for row in rows for run in row.runs), "score")


def _higher_is_better(rows: list[Row]) -> bool:
    return next((run["higher_is_better"] for row in rows for run in row.runs), True)


_MOST_MOVES = 200
"""Points that a label may be moved by: more than all labels of a plot are high."""
_IN_DOCUMENTS_ALONE = ("seeds", "parameters", "adapter, MiB", "training, s")
"""Columns that a terminal has no room for."""


def _cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = [name.format(score=_score_name(rows)) for name, _ in _COLUMNS]
    made = []
    for row in rows:
        cells = [cell(row) for _, cell in _COLUMNS]
        if row.failures:
            cells[1] = f"{cells[1]} (failed {len(row.failures)} times)" if row.runs else "failed"
        made.append(cells)
    return header, made


def table(case: str, rows: list[Row]) -> Table:
    """For the terminal."""
    header, cells = _cells(rows)
    made = Table(title=case, caption=CAPTION)
    shown = [position for position, name in enumerate(header) if name not in _IN_DOCUMENTS_ALONE]
    for position in shown:
        # A header breaks between its words; narrower than one of them, a column would cut it.
        widest = max(map(len, header[position].split()))
        made.add_column(header[position], justify="left" if position == 0 else "right", min_width=widest)
    for line in cells:
        made.add_row(*(line[position] for position in shown))
    return made


def markdown(rows: list[Row]) -> str:
    """The same for a document; failures are told below it."""
    header, cells = _cells(rows)
    lines = [header, ["---"] * len(header), *cells]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    failures = [f"* {row.title}: {reason}" for row in rows for reason in sorted(set(row.failures))]
    return "\n".join([text, *([""] if failures else []), *failures])


def plot(cases: dict[str, list[Row]], folder: Path, *, against: str) -> bool:
    """The score against the peak of a step or the time of one (``against``: ``"memory"`` or ``"time"``), as PNG.

    Returns:
        Whether there was anything to show.
    """
    require("matplotlib")
    from matplotlib.figure import Figure  # no pyplot: no global state, no display needed

    shown = {case: [row for row in rows if _place(row, against) is not None] for case, rows in cases.items()}
    shown = {case: rows for case, rows in shown.items() if rows}
    if not shown:
        return False
    figure = Figure(figsize=(5.2 * min(2, len(shown)), 4 * ((len(shown) + 1) // 2)), layout="constrained")
    grid = figure.subplots((len(shown) + 1) // 2, min(2, len(shown)), squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    labels: list[Any] = []
    for axes, (case, rows) in zip(grid.flat, shown.items(), strict=False):
        places = [(row, *_coordinates(row, against)) for row in rows]
        for row, x, y in places:
            ours = row.rival.startswith("meft")
            spread = statistics.stdev(row.values("score")) if len(row.runs) > 1 else 0.0
            axes.errorbar(x, y, yerr=spread, fmt="o" if ours else "s", color="C0" if ours else "C1", capsize=2)
            labels.append(axes.annotate(row.title, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7))
        front = _front(places, higher=_higher_is_better(rows))
        axes.step([x for _, x, _ in front], [y for _, _, y in front], where="post", color="grey", lw=0.8, ls="--")
        unit = "peak of a step, MiB" if against == "memory" else "step / LoRA + checkpointing"
        axes.set(title=case, xlabel=unit, ylabel=_score_name(rows))
        axes.margins(x=0.15, y=0.15)
    set_apart(figure, labels)
    figure.savefig(folder / f"{against}.png", dpi=110)
    return True


def set_apart(figure: Any, labels: list[Any]) -> None:
    """Move labels of points up until none lies on another; each stays above its point."""
    figure.draw_without_rendering()  # which decides where the axes are
    placed: list[Any] = []
    for label in sorted(labels, key=lambda label: float(label.get_window_extent().y0)):
        for _ in range(_MOST_MOVES):
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in placed):
                break
            across, up = label.get_position()
            label.set_position((across, up + 1))
        placed.append(label.get_window_extent())


def _place(row: Row, against: str) -> float | None:
    if not row.runs or row.rival == "none":
        return None
    peak = row.mean("peak_bytes")
    return row.ratio if against == "time" else None if peak is None else peak / MIB


def _coordinates(row: Row, against: str) -> tuple[float, float]:
    place, score = _place(row, against), row.mean("score")
    assert place is not None and score is not None
    return place, score


def _front(places: list[tuple[Row, float, float]], *, higher: bool) -> list[tuple[Row, float, float]]:
    """Those that no other beats in both."""
    best: list[tuple[Row, float, float]] = []
    for place in sorted(places, key=lambda place: place[1]):
        if not best or (place[2] > best[-1][2] if higher else place[2] < best[-1][2]):
            best.append(place)
    return best
