"""Labelled texts by name: film reviews that come with a pip package, any CSV file, GLUE, or questions and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..packages import require
from ..programs.training.sources import REVIEW_SETS, open_rows
from .labelled import LabelledTexts, Split
from .suites import SUITES, load_suite

_BINARY_NAMES = ("negative", "positive")


def load_texts(name: str, *, held_out: int = 1024, train: int | None = None, seed: int = 0) -> LabelledTexts:
    """``rotten_tomatoes``, ``imdb``, a CSV file with the columns text and label, or a name of :mod:`.suites`.

    The same seed gives the same split. Repeated texts are dropped, or one could be in both parts. Suites come split:
    there the held-out texts are drawn from their own validation set.

    Raises:
        ValueError: no such set or file, missing columns, fewer than two classes, or too few rows.
        MissingPackageError: the package with the reviews, or ``datasets``, is not installed.
    """
    require("datasets")
    if name.partition("=")[0] in SUITES:
        return load_suite(name, held_out=held_out, train=train, seed=seed)
    path = Path(name)
    if name not in REVIEW_SETS and (path.suffix != ".csv" or not path.is_file()):
        raise ValueError(
            f"--data is one of {', '.join(REVIEW_SETS)} or an existing .csv file, not {name!r}; and of "
            f"{', '.join(SUITES)}"
        )
    rows, _ = open_rows(name)
    if missing := {"text", "label"} - set(rows.column_names):
        raise ValueError(f"{name} has no column {' and no column '.join(sorted(missing))}; it has {rows.column_names}")
    texts, labels = _clean(rows["text"][:], rows["label"][:])
    values = sorted(set(labels))
    if len(values) < 2:
        raise ValueError(f"{name} has only one class: {values}")
    if held_out < 1 or (train is not None and train < 1):
        raise ValueError(f"the training and the held-out set need at least 1 text each, not {train} and {held_out}")
    wanted = held_out + (train or 1)
    if len(texts) < wanted:
        raise ValueError(f"{name} has {len(texts)} different texts, fewer than the {wanted} asked for")

    everything = Split(texts, [values.index(label) for label in labels])
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    last = None if train is None else held_out + train
    return LabelledTexts(
        name=path.stem,
        classes=_BINARY_NAMES if values in ([0, 1], ["0", "1"]) else tuple(str(value) for value in values),
        train=everything.take(order[held_out:last]),
        held_out=everything.take(order[:held_out]),
    )


def _clean(texts: list[Any], labels: list[Any]) -> tuple[list[str], list[Any]]:
    """The rows that have a text and a label, each text once."""
    kept: dict[str, Any] = {}
    for text, label in zip(texts, labels, strict=True):
        if text is not None and label is not None:
            kept.setdefault(str(text), label)
    return list(kept), list(kept.values())


def batch_indices(texts: list[str], *, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Which examples each training step sees, the same for every method.

    Each pass over the data is a new permutation. Within a window of eight batches, texts of like length are put
    together, for less padding, and the batches are shuffled again.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(texts) < batch_size:
        raise ValueError(f"{len(texts)} training texts are fewer than one batch of {batch_size}")
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(len(texts), generator=generator).tolist()
        for start in range(0, len(order), 8 * batch_size):
            window = sorted(order[start : start + 8 * batch_size], key=lambda i: len(texts[i]))
            full = [window[i : i + batch_size] for i in range(0, len(window) - batch_size + 1, batch_size)]
            batches += [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
    return batches[:steps]
