"""Estimates as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..comparison.rivals import Rival
from .shapes import longest_input
from .sizes import GIB, gib
from .step import StepBytes


@dataclass(frozen=True)
class Estimate:
    """One rival's row.

    Attributes:
        longest: tokens of a text that fit; None where no size of memory was given.
        longest_host: bytes of host memory that a text of so many takes.
        unavailable: why there are no figures.
    """

    rival: Rival
    step: StepBytes | None = None
    longest: int | None = None
    longest_host: int = 0
    unavailable: str | None = None


def _bytes(value: int) -> str:
    if not value:
        return "0"
    return f"{value / GIB:,.2f}" if value >= GIB / 100 else f"{value / GIB:,.4f}"


def table(estimates: list[Estimate], *, config: Any, capacity: int | None) -> Table:
    """One row a rival, in GiB."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    made.add_column("GiB", min_width=len("checkpointing"))
    host = any(estimate.step is not None and estimate.step.host for estimate in estimates)
    columns = ["weights", "grads,\nAdamW", "kept", "peak", "total", *(["host"] if host else [])]
    if capacity is not None:
        columns += ["fits", "longest", *(["host,\nlongest"] if host else [])]
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    for estimate in estimates:
        step = estimate.step
        if step is None:
            made.add_row(estimate.rival.title, *["-"] * (len(made.columns) - 1))
            continue
        cells = [step.weights, step.gradients + step.optimizer, step.kept, step.peak, step.total]
        row = [_bytes(value) for value in (*cells, *([step.host] if host else []))]
        if capacity is not None:
            row += ["yes" if step.total <= capacity else "no", _context(estimate.longest, config)]
            row += [_bytes(estimate.longest_host)] if host else []
        made.add_row(estimate.rival.title, *row)
    return made


def _context(longest: int | None, config: Any) -> str:
    if longest is None:
        return "-"
    return f"all {longest:,}" if longest == longest_input(config) else f"{longest:,}"


def way_out(estimates: list[Estimate], capacity: int, *, rows: int, quantised: bool) -> str | None:
    """What would fit, where nothing does; None where something does, or nothing is known.

    Args:
        estimates: with the longest text of each.
        capacity: bytes that there are.
        rows: texts in a batch.
        quantised: whether the weights are in few bits already.
    """
    known = [(estimate, estimate.step) for estimate in estimates if estimate.step is not None]
    if not known or any(step.total <= capacity for _, step in known):
        return None
    weights = min(step.weights for _, step in known)
    best = max((estimate for estimate, _ in known), key=lambda estimate: estimate.longest or 0)
    if best.longest:
        said = f"nothing of this fits; the longest text that does has {best.longest:,} tokens, with {best.rival.title}"
    else:
        said = f"nothing of this fits, not even texts of one token: the weights take {gib(weights)} of {gib(capacity)}"
    less = [
        *(["--weights 4bit"] if not quantised else []),
        *([f"--batch below {rows}"] if rows > 1 else []),
        *(["the settings that meft-kernels plan tries"] if weights < capacity else []),
        "a larger --gpu",
    ]
    return f"{said}. What may help: {', '.join(less)}"


def figures(estimate: Estimate) -> dict[str, Any]:
    """Plain values for JSON."""
    step = estimate.step
    measured = {} if step is None else {**vars(step), "peak": step.peak, "total": step.total}
    return {
        "rival": estimate.rival.name,
        **measured,
        "longest": estimate.longest,
        "longest_host": estimate.longest_host,
        "unavailable": estimate.unavailable,
    }
