"""Rows made ready: which task they are for, what is wrong with them, what is held out, and their tokens."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...packages import TRAIN_EXTRA, require
from .columns import COLUMNS, Layout, Task, choose
from .conversations import KEYS, conversation
from .settings import DataSettings
from .sources import open_rows
from .tokens import Encoder

_MOST_HELD_OUT = 1000
Row = tuple[Any, ...]
"""(text, label), (text,), (prompt, completion), (instruction, input or "", output) or (messages,)."""
_Numbered = tuple[int, Row]


@dataclass(frozen=True)
class Rows:
    """Rows as they came, each once: those to train on and those held out."""

    layout: Layout
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels; empty for a language model."""
    train: list[Row]
    held_out: list[Row]
    numbers: tuple[list[int], list[int]]
    """Which rows of the source those are, counted from 1: an error names its row by it."""
    incomplete: int
    """Rows left out, because something in them is empty."""
    repeated: int
    """Rows left out, because another has the same text."""

    @property
    def task(self) -> Task:
        """What is trained on them."""
        return self.layout.task

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
    names = {each: getattr(settings, each) for each in COLUMNS}
    layout = choose(name, rows.column_names, names, requested)
    for part in (rows, held_out) if held_out is not None else (rows,):
        _check_columns(name, part, layout, names)
    wanted_columns = " and ".join(names[each] for each in layout.needed)
    found, left_out = _complete(name, rows, layout, names)
    if not found:
        raise ValueError(f"{name} has no rows with {wanted_columns}")
    if held_out is not None:
        kept, more = _complete(name, held_out, layout, names)
        train = _drawn(found, settings.split_seed)
        if isinstance(settings.held_out, float):
            raise ValueError(
                f"{name} has a part that is held out: data.held_out can be a number of its texts, not a share"
            )
        if settings.held_out is not None:  # drawn, because parts are often sorted by class
            kept = _drawn(kept, settings.split_seed)[: settings.held_out]
        left_out += more
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
        raise ValueError(f"{name}: the part that is held out has no rows with {wanted_columns}")
    parts = [[row for _, row in part] for part in (train, kept)]
    classes: tuple[str, ...] = ()
    if layout.task == "classification":
        labels = [row[1] for _, row in found]
        classes, index = _classes(name, rows.features[settings.label], labels, settings.label)
        if unknown := {row[1] for row in parts[1]} - index.keys():
            raise ValueError(f"{name}: the held-out part has classes that the training part lacks: {_few(unknown)}")
        parts = [[(text, index[label]) for text, label in part] for part in parts]
    numbers = ([number for number, _ in train], [number for number, _ in kept])
    return Rows(layout, classes, parts[0], parts[1], numbers, left_out["incomplete"], left_out["repeated"])


def encode(rows: Rows, encoder: Encoder) -> tuple[Any, Any, int]:
    """Tokens of both parts, as ``datasets.Dataset``, and how many rows had none left to train on.

    Raises:
        ValueError: no row is left, or one cannot be written in the model's tokens; the message has its number.
    """
    datasets = require("datasets", TRAIN_EXTRA)
    function: Callable[[Row], dict[str, Any] | None] = encoder.for_layout(rows.layout)
    made, lost = [], 0
    for name, part, numbers in (
        ("train", rows.train, rows.numbers[0]),
        ("held-out", rows.held_out, rows.numbers[1]),
    ):
        encoded = []
        for number, row in zip(numbers, part, strict=True):
            try:
                tokens = function(row)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            if tokens is not None:
                encoded.append(tokens)
        lost += len(part) - len(encoded)
        if not encoded:
            raise ValueError(f"no {name} text has tokens to learn from within max_length={encoder.max_length}")
        made.append(datasets.Dataset.from_list(encoded))
    return made[0], made[1], lost


def _check_columns(name: str, rows: Any, layout: Layout, names: Mapping[str, str]) -> None:
    if missing := [names[what] for what in layout.needed if names[what] not in rows.column_names]:
        raise ValueError(f"{name}: the held-out part has no column {' and no column '.join(missing)}")
    if not len(rows):
        raise ValueError(f"{name} has no rows")
    for what in layout.needed:
        feature = rows.features[names[what]]
        if what in ("messages", "conversations"):
            if not any(f"'{who}'" in str(feature) for who, _ in KEYS):
                raise ValueError(f"{name}: the column {names[what]} holds {_kind(feature)}, not lists of messages")
        elif what != "label" and getattr(feature, "dtype", "") not in ("string", "large_string"):
            raise ValueError(f"{name}: the column {names[what]} holds {_kind(feature)}, not text")


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _complete(name: str, rows: Any, layout: Layout, names: Mapping[str, str]) -> tuple[list[_Numbered], Counter[str]]:
    """The rows that have everything, each text once, and how many are left out for which reason.

    A text that came twice could be both trained on and held out, with whichever label.
    """
    kept: dict[str, _Numbered] = {}
    left_out: Counter[str] = Counter()
    columns = [_values(rows, names[what], what in layout.optional) for what in _in_order(layout)]
    for number, row in enumerate(zip(*columns, strict=True), 1):
        if any(_is_empty(value) for value, what in zip(row, _in_order(layout), strict=True) if what in layout.needed):
            left_out["incomplete"] += 1
            continue
        if layout.needed[0] in ("messages", "conversations"):
            try:
                row = (conversation(row[0]),)
            except ValueError as error:
                raise ValueError(f"{name}, row {number}: {error}") from None
        key = row[0] if layout.task == "classification" else json.dumps(row, default=str)
        left_out["repeated"] += key in kept
        kept.setdefault(key, (number, row))
    return list(kept.values()), left_out


def _in_order(layout: Layout) -> tuple[str, ...]:
    """What a row holds, in the order of :data:`Row`: what is optional comes before the last."""
    return (*layout.needed[:-1], *layout.optional, layout.needed[-1])


def _values(rows: Any, column: str, optional: bool) -> list[Any]:
    if not optional:
        return list(rows[column][:])
    return [value or "" for value in rows[column][:]] if column in rows.column_names else [""] * len(rows)


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _drawn(rows: list[_Numbered], seed: int) -> list[_Numbered]:
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
