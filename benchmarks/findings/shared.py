"""What every finding is made of: jobs whose results are kept as JSON; a table, a plot and a text made from those."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meft_kernels.comparison.records import Record

CPU = torch.device("cpu")
VARIANTS = ("meft1", "meft2", "meft3")
PAPER: dict[str, Any] = {
    "arithmetic": "float", "coupling": "paper", "readout": "mean", "down_init_std": 0.02, "up_init_std": 0.02,
}  # fmt: skip
"""``MeftConfig.paper`` but for the rank, which is the comparison's."""
LANES = {"meft1": ("lam",), "meft2": ("beta",), "meft3": ("lam", "beta")}
"""The coefficients that each variant has to choose; the other one is 1."""


@dataclass(frozen=True)
class Sizes:
    """How much is run. A sweep is cut short by its seeds, and goes on from what is there."""

    classifier: str = "minilm"
    language_model: str = "smollm2"
    data: str = "rotten_tomatoes"
    steps: int = 60
    batch_size: int = 16
    max_length: int = 64
    held_out: int = 512
    seeds: tuple[int, ...] = (0,)
    rows: int = 4
    """Of the batches on which a start is measured."""
    tokens: int = 64
    draws: int = 1
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    coefficients: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256)
    """Coefficients are 1/q; these are the q."""
    trained_coefficients: tuple[int, ...] = (1, 8, 256)
    amounts: int = 5
    """How many starts, the pretrained model's own among them."""
    rounds: int = 3
    """Of interleaved timed steps."""
    reversible: tuple[int, ...] = (0, 2, 4, 6)
    """Reversible layers with which the classifier is trained."""
    deep_reversible: tuple[int, ...] = (0, 15, 30)
    """Reversible layers of the language model, of which only the cost is measured."""


QUICK = Sizes(
    language_model="minilm",
    steps=1,
    batch_size=2,
    max_length=16,
    held_out=8,
    rows=2,
    tokens=16,
    dtypes=("float32",),
    coefficients=(1, 8),
    trained_coefficients=(256,),
    amounts=2,
    rounds=1,
    reversible=(0, 6),
    deep_reversible=(0, 6),
)
"""Seconds, to see that everything runs; its figures mean nothing."""


@dataclass(frozen=True)
class Job:
    """One run: what it is asked for decides what it measures, and under what name it is kept."""

    kind: str
    label: str
    """For the file's name; the same run may go by another one in another finding, which then finds it too."""
    settings: dict[str, Any]
    measure: Callable[[dict[str, Any]], Any]

    def path(self, folder: Path) -> Path:
        """Where its record is, or will be."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:10]
        there = sorted((folder / self.kind).glob(f"*-{digest}.json"))
        return there[0] if there else folder / self.kind / f"{self.label}-{digest}.json"

    def stored(self, folder: Path) -> Record | None:
        """The record of this job, if it was run before.

        Raises:
            ValueError: the file is no record, or one of another job.
        """
        path = self.path(folder)
        if not path.is_file():
            return None
        record = Record.read(path)
        if (record.kind, record.settings) != (self.kind, json.loads(json.dumps(self.settings))):
            raise ValueError(f"{path} holds another run than its name says: delete it, and it is measured again")
        return record

    def run(self, folder: Path) -> Record:
        """Measure, keep, and hand back as it can be read from then on."""
        Record.now(self.kind, self.settings, self.measure(self.settings), CPU).write(self.path(folder))
        record = self.stored(folder)
        assert record is not None
        return record


@dataclass(frozen=True)
class Finding:
    """One finding. Table, text and plot are made from the records alone, and from as many as there are."""

    name: str
    title: str
    claim: str
    """What the paper says, or what is asked."""
    jobs: Callable[[Sizes], list[Job]]
    table: Callable[[list[Record]], list[list[str]]]
    """Rows of cells, the heading first."""
    text: Callable[[list[Record]], str]
    draw: Callable[[list[Record], Any], None]
    """Into a matplotlib Figure."""
    width: float = 11.0


def finite(value: float | torch.Tensor) -> float | None:
    """JSON has no infinity and no NaN."""
    number = float(value)
    return number if math.isfinite(number) else None


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    return [record for record in records if record.kind == kind]


def what_was_run(records: list[Record]) -> str:
    """What all records of a kind have in common, and the machine, for the reader of a table."""
    parts = []
    for kind in dict.fromkeys(record.kind for record in records):
        same = of_kind(records, kind)
        settings = {
            name: value
            for name, value in same[0].settings.items()
            if not isinstance(value, dict) and all(record.settings.get(name) == value for record in same)
        }
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
        parts.append(f"{len(same)} of {kind.removeprefix('finding-')} ({words})")
    devices = sorted({record.environment.get("device", "?") for record in records})
    versions = sorted({record.environment.get("torch", "?") for record in records})
    return f"Runs: {'; '.join(parts)}. On {'; '.join(devices)}; torch {', '.join(versions)}."


def mean_of(records: Iterable[Record], figure: str) -> float | None:
    """The mean over runs (seeds); None where there is none, or one of them has none, for training stopped."""
    values = [record.figures[figure] for record in records]
    return statistics.mean(values) if values and None not in values else None


def standard_error(accuracy: float, texts: int) -> float:
    """Of an accuracy in percent, from the number of held-out texts alone."""
    share = min(max(accuracy / 100, 0.5 / texts), 1 - 0.5 / texts)  # never 0: even 8 of 8 is not certainty
    return 100 * math.sqrt(share * (1 - share) / texts)


def change(before: float, after: float, texts: int) -> str:
    """What the step from one accuracy to another amounts to, beside the error of the difference.

    That error is the one of the number of texts alone, as if each accuracy had been taken on other texts, which makes
    it too large; what another seed would change is not in it, which makes it too small.
    """
    error = math.hypot(standard_error(before, texts), standard_error(after, texts))
    size = after - before
    if abs(size) < 2 * error:
        return f"no difference beyond chance ({size:+.1f} points, standard error {error:.1f})"
    return f"{'falls' if size < 0 else 'rises'} by {abs(size):.1f} points (standard error {error:.1f})"


def percent(value: float | None) -> str:
    return "stopped" if value is None else f"{value:.1f}"


def power(value: float | None) -> str:
    return "overflow" if value is None else "0" if value == 0 else f"{value:.1e}"


def fraction(q: int) -> str:
    return "1" if q == 1 else f"1/{q}"


def coefficients(variant: str, q: int, *, sign: int) -> dict[str, float]:
    """The variant's own coefficients at +-1/q."""
    return dict.fromkeys(LANES[variant], sign / q)
