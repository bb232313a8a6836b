"""Rows made ready: which task they are for, what is wrong with them, what is held out, and their tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...packages import TRAIN_EXTRA, require
from .columns import COLUMNS, Task, choose
from .settings import DataSettings
from .sources import open_rows
from .tokens import Encoder

_MOST_HELD_OUT = 1000
Row = tuple[Any, ...]
"""(text, label), (text,), (prompt, completion) or (messages,)."""


@dataclass(frozen=True)
class Rows:
    """Rows as they came, each once: those to train on and those held out."""

    task: Task
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels; empty for a language model."""
    train: list[Row]
    held_out: list[Row]
    dropped: int
    """Rows left out: incomplete, or a repetition of another."""

    def fingerprint(self) -> str:
        """A digest of every row and its place."""
        digest = hashlib.sha256()
        for part in (self.classes, self.train, self.held_out):
            digest.update(json.dumps(part, ensure_ascii=False, default=str).encode())
        return digest.hexdigest()


def load_rows(settings: DataSettings, requested: Task | None) -> Rows:
    """Open the source, decide the task, and check every row.

    Raises:
        ValueError: columns are missing or of the wrong type, there are too few rows or classes.
        MissingPackageError: the data needs a package that is not installed.
    """
    name = str(settings.source)
    rows, held_out = open_rows(name, split=settings.split, held_out_split=settings.held_out_split)
    task, columns = choose(name, rows.column_names, {each: getattr(settings, each) for each in COLUMNS}, requested)
    for part in (rows, held_out) if held_out is not None else (rows,):
        _check_columns(name, part, columns, settings)
    found, dropped = _complete(rows, columns, task)
    if not found:
        raise ValueError(f"{name} has no rows with {' and '.join(columns)}")
    if held_out is not None:
        kept, more = _complete(held_out, columns, task)
        train = _drawn(found, settings.split_seed)
        if isinstance(settings.held_out, float):
            raise ValueError(
                f"{name} has a part that is held out: data.held_out can be a number of its texts, not a share"
            )
        if settings.held_out is not None:  # drawn, because parts are often sorted by class
            kept = _drawn(kept, settings.split_seed)[: settings.held_out]
        dropped += more
    else:
        wanted = _share(settings.held_out, len(found))
        if len(found) <= wanted:
            raise ValueError(
                f"{name} has {len(found)} different rows, too few to hold out {wanted} and train on others"
            )
        order = _drawn(found, settings.split_seed)
        kept, train = order[:wanted], order[wanted:]
    if settings.train_texts is not None and len(train) < settings.train_texts:
        raise ValueError(f"{name} has {len(train)} rows to train on, fewer than the {settings.train_texts} asked for")
    train = train[: settings.train_texts]
    if not kept:
        raise ValueError(f"{name}: the part that is held out has no rows with {' and '.join(columns)}")
    if task != "classification":
        return Rows(task, columns, (), train, kept, dropped)
    classes, index = _classes(name, rows.features[settings.label], [row[1] for row in found], settings.label)
    if unknown := {row[1] for row in kept} - index.keys():
        raise ValueError(f"{name}: the held-out part has classes that the training part lacks: {_few(unknown)}")
    train, kept = ([(text, index[label]) for text, label in part] for part in (train, kept))
    return Rows(task, columns, classes, train, kept, dropped)


def encode(rows: Rows, encoder: Encoder) -> tuple[Any, Any, int]:
    """Tokens of both parts, as ``datasets.Dataset``, and how many rows had none left to train on.

    Raises:
        ValueError: no row is left.
    """
    datasets = require("datasets", TRAIN_EXTRA)
    function: Callable[[Row], dict[str, Any] | None] = encoder.for_columns(rows.columns, rows.task)
    made, lost = [], 0
    for name, part in (("train", rows.train), ("held-out", rows.held_out)):
        encoded = [found for row in part if (found := function(row)) is not None]
        lost += len(part) - len(encoded)
        if not encoded:
            raise ValueError(f"no {name} text has tokens to learn from within max_length={encoder.max_length}")
        made.append(datasets.Dataset.from_list(encoded))
    return made[0], made[1], lost


def _check_columns(name: str, rows: Any, columns: tuple[str, ...], settings: DataSettings) -> None:
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(f"{name}: the held-out part has no column {' and no column '.join(missing)}")
    if not len(rows):
        raise ValueError(f"{name} has no rows")
    for column in columns:
        kind = getattr(rows.features[column], "dtype", "")
        if column in (settings.text, settings.prompt, settings.completion) and kind not in ("string", "large_string"):
            raise ValueError(f"{name}: the column {column} holds {_kind(rows.features[column])}, not text")
        if column == settings.messages and "role" not in str(rows.features[column]):
            raise ValueError(f"{name}: the column {column} holds {_kind(rows.features[column])}, not lists of messages")


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _complete(rows: Any, columns: tuple[str, ...], task: Task) -> tuple[list[Row], int]:
    """The rows that have everything, each text once, and how many are left out.

    A text that came twice could be both trained on and held out, with whichever label.
    """
    kept: dict[str, Row] = {}
    values = [rows[column][:] for column in columns]
    for row in zip(*values, strict=True):
        if all(value is not None and value != "" for value in row):
            kept.setdefault(row[0] if task == "classification" else json.dumps(row, default=str), row)
    return list(kept.values()), len(rows) - len(kept)


def _drawn(rows: list[Row], seed: int) -> list[Row]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[index] for index in order]


def _share(held_out: int | float | None, rows: int) -> int:
    if held_out is None:
        return max(1, min(_MOST_HELD_OUT, rows // 10))
    return held_out if isinstance(held_out, int) else max(1, round(held_out * rows))


def _classes(name: str, feature: Any, labels: list[Any], column: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names of the classes, and the index of each label that occurs."""
    values = sorted(set(labels))
    if any(isinstance(value, float) for value in values):
        if any(value != int(value) for value in values):
            raise ValueError(f"{name}: the column {column} holds {_few(values)}: numbers, not classes")
        # pandas makes floats of integers beside an empty field; 1.0 finds 1 as a key.
        values = [int(value) for value in values]
    if not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"{name}: the column {column} holds {_kind(feature)}; a class is a number or a name")
    if len(values) < 2:
        raise ValueError(f"{name}: the column {column} has only one class: {values[0]!r}")
    if len(values) > max(2, len(labels) // 2):
        raise ValueError(f"{name}: the column {column} has {len(values)} classes in {len(labels)} rows: {_few(values)}")
    if (names := getattr(feature, "names", None)) is not None:
        if values[0] < 0 or values[-1] >= len(names):
            raise ValueError(f"{name}: the column {column} has {values[0]}, which is none of its {len(names)} classes")
        return tuple(names), {index: index for index in range(len(names))}
    return tuple(map(str, values)), {value: index for index, value in enumerate(values)}


def _few(values: Any) -> str:
    shown = sorted(map(str, values))
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")
