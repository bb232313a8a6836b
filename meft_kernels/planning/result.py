"""What a plan says: every candidate that was looked at, and the first that fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..config import MeftConfig
from ..estimate.sizes import gib
from ..estimate.step import StepBytes


@dataclass(frozen=True)
class Candidate:
    """Settings, and what a training step takes with them."""

    what: str
    """In words."""
    cost: str
    """In time, against a step of which every layer is reversible and nothing else is changed."""
    settings: dict[str, Any]
    """What they change, by name."""
    step: StepBytes
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What :func:`meft_kernels.plan` returns; ``str()`` gives a table.

    ``patch(model, plan.config)`` does what was planned.
    """

    config: MeftConfig
    """All settings, the chosen ones among them."""
    settings: dict[str, Any]
    """Those that were chosen and differ from what was given."""
    candidates: tuple[Candidate, ...]
    """As they were tried; the last one was chosen."""
    memory: int
    """Bytes of the budget."""
    reserve: int
    """Bytes of it that are left for what is no tensor."""
    rows: int
    tokens: int
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        return self.candidates[-1]

    @property
    def total(self) -> int:
        """The most bytes in tensors at any time of a step, weights included."""
        return self.chosen.step.total

    @property
    def host(self) -> int:
        """The most in host memory."""
        return self.chosen.step.host

    def changed(self, base: MeftConfig) -> dict[str, Any]:
        """All settings that are not those of ``base``."""
        return {
            f.name: getattr(self.config, f.name)
            for f in dataclasses.fields(MeftConfig)
            if getattr(self.config, f.name) != getattr(base, f.name)
        }

    def python(self) -> str:
        """The line that does what was planned."""
        changed = [f"{name}={value!r}" for name, value in self.changed(MeftConfig()).items()]
        return f"meft_kernels.patch({', '.join(['model', *changed])})"

    def line(self) -> str:
        """All of it in one line."""
        chosen = ", ".join(f"{name}={value!r}" for name, value in self.settings.items()) or "settings as given"
        host = f", {gib(self.host)} of host memory" if self.host else ""
        return (
            f"{gib(self.memory)} for {self.rows} x {self.tokens:,} tokens: {chosen} ({self.chosen.what}); "
            f"{gib(self.total)} in tensors{host}, {gib(self.reserve)} in reserve"
        )

    def rows_of_table(self) -> list[tuple[str, ...]]:
        """The head of the table and its cells."""
        host = any(each.step.host for each in self.candidates)
        head = ("settings, as tried", "time", "peak", "total", *(["host"] if host else []), "fits")
        body = [
            (
                each.what,
                each.cost,
                gib(each.step.peak),
                gib(each.step.total),
                *([gib(each.step.host) if each.step.host else "0"] if host else []),
                "yes" if each.fits else "no",
            )
            for each in self.candidates
        ]
        return [head, *body]

    def __str__(self) -> str:
        return table(self.rows_of_table(), self.title, (*self.notes, f"chosen: {self.python()}"))

    @property
    def title(self) -> str:
        return (
            f"{gib(self.memory)} for {self.rows} x {self.tokens:,} tokens, {gib(self.reserve)} of it in reserve: "
            f"{gib(self.memory - self.reserve)} for tensors"
        )


def table(rows: list[tuple[str, ...]], title: str, notes: tuple[str, ...]) -> str:
    """Plain text; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([title, *lines, *notes])
