"""What is told of the data before training, and of each class after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .data import Rows
from .tokens import Encoder

_SHOWN = 20
"""Classes that are listed; ``metrics.json`` has all of them."""


def told_of_data(rows: Rows, encoder: Encoder, lost: int) -> list[tuple[str, str | None]]:
    """Lines to print, each with its style, after :func:`~meft_kernels.programs.training.data.encode`.

    Args:
        rows: what was loaded.
        encoder: the one that made tokens of them, which has counted what it cut.
        lost: rows that had no tokens to learn.
    """
    told: list[tuple[str, str | None]] = []
    if rows.classes:
        told += [(_counts(rows), None), *((line, "yellow") for line in _odd_classes(rows))]
    if rows.incomplete + rows.repeated + lost:
        reasons = (
            (rows.incomplete, "with something empty"),
            (rows.repeated, "whose text came before"),
            (lost, "without tokens to learn"),
        )
        told.append(("left out: rows " + ", ".join(f"{what}: {count}" for count, what in reasons if count), None))
    if encoder.cut:
        texts = len(rows.train) + len(rows.held_out) - lost
        told.append((f"cut off after max_length={encoder.max_length} tokens: {encoder.cut} of {texts} texts", None))
    return told


def _counts(rows: Rows) -> str:
    train, held_out = (Counter(row[1] for row in part) for part in (rows.train, rows.held_out))
    order = sorted(range(len(rows.classes)), key=lambda index: -train[index])
    listed = [f"{rows.classes[index]}: {train[index]} + {held_out[index]}" for index in order[:_SHOWN]]
    more = f", and {len(order) - _SHOWN} smaller ones" if len(order) > _SHOWN else ""
    return f"{len(order)} classes, texts to train on + held out: {', '.join(listed)}{more}"


def _odd_classes(rows: Rows) -> list[str]:
    alike: dict[str, list[str]] = {}
    for name in rows.classes:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    said = [
        f"{', '.join(map(repr, names))} are {len(names)} classes, which differ in case or blanks alone: if they are "
        "one, make them one in the data"
        for names in alike.values()
        if len(names) > 1
    ]
    seen = {row[1] for row in rows.train}
    if unseen := [name for index, name in enumerate(rows.classes) if index not in seen]:
        said.append(f"no text to train on has the class {', '.join(map(repr, unseen[:_SHOWN]))}")
    return said


def class_table(classes: Sequence[dict[str, Any]]) -> Table:
    """The figures of :class:`~meft_kernels.programs.training.metrics.Accuracy`, a class a row."""
    made = Table("class", title=None)
    for column in ("held-out texts", "precision, %", "recall, %"):
        made.add_column(column, justify="right")
    for each in sorted(classes, key=lambda each: -each["texts"])[:_SHOWN]:
        shares = ("-" if each[name] is None else f"{100 * each[name]:.1f}" for name in ("precision", "recall"))
        made.add_row(str(each["class"]), str(each["texts"]), *shares)
    if len(classes) > _SHOWN:
        made.caption = f"and {len(classes) - _SHOWN} smaller classes in metrics.json"
    return made
