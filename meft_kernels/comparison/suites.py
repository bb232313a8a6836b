"""GLUE's tasks, and the paper's five of questions and answers, from the hub or from a folder of ``save_to_disk``.

``glue/sst2`` is loaded from the hub; ``glue/sst2=folder`` from a folder that holds what ``datasets.load_dataset`` gave.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..packages import require
from .labelled import LabelledTexts, Metric, Prompt, Split

LETTERS = ("A", "B", "C", "D", "E")
_QUESTION = Prompt(head="Question:", tail="\nAnswer:")
_SENTENCE = Prompt(head="Sentence:", tail="\nLabel:", middle="\nSecond sentence:")

Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """One task.

    Attributes:
        hub: id and configuration on the hub.
        classes: names of the labels; none for a regression.
        read: a row's text, second text or None, and label.
        validation: name of the held-out part.
        revision: where a hub's data set is a script, the branch with its files.
    """

    hub: tuple[str, str | None]
    classes: tuple[str, ...]
    read: Callable[[Row], tuple[str, str | None, Any]]
    prompt: Prompt
    metric: Metric = "accuracy"
    validation: str = "validation"
    revision: str | None = None


def _glue(
    name: str,
    first: str,
    second: str | None,
    *classes: str,
    metric: Metric = "accuracy",
    validation: str = "validation",
) -> Suite:
    def read(row: Row) -> tuple[str, str | None, Any]:
        return row[first], None if second is None else row[second], row["label"]

    return Suite(("nyu-mll/glue", name), classes, read, _SENTENCE, metric, validation)


def _options(question: str, options: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))])


def _multiple_choice(question: str) -> Callable[[Row], tuple[str, str | None, Any]]:
    """AI2's form. Some answers are numbered instead of lettered."""

    def read(row: Row) -> tuple[str, str | None, Any]:
        choices = row["choices"]
        return _options(row[question], choices["text"]), None, choices["label"].index(row["answerKey"])

    return read


def _piqa(row: Row) -> tuple[str, str | None, Any]:
    return _options(row["goal"], [row["sol1"], row["sol2"]]), None, row["label"]


def _sciq(row: Row) -> tuple[str, str | None, Any]:
    """The right answer has a column of its own there: shuffled by the question, so that a row is always the same."""
    options = [row["correct_answer"], row["distractor1"], row["distractor2"], row["distractor3"]]
    order = random.Random(row["question"]).sample(range(4), 4)
    return _options(row["question"], [options[i] for i in order]), None, order.index(0)


# Metrics as in the LoRA and MEFT papers: Matthews' correlation for CoLA (Pearson's, of 0 and 1), Pearson's for STS-B.
SUITES: dict[str, Suite] = {
    "glue/cola": _glue("cola", "sentence", None, "unacceptable", "acceptable", metric="correlation"),
    "glue/sst2": _glue("sst2", "sentence", None, "negative", "positive"),
    "glue/mrpc": _glue("mrpc", "sentence1", "sentence2", "different", "equivalent"),
    "glue/stsb": _glue("stsb", "sentence1", "sentence2", metric="correlation"),
    "glue/qqp": _glue("qqp", "question1", "question2", "different", "duplicate"),
    "glue/mnli": _glue(
        "mnli", "premise", "hypothesis", "entailment", "neutral", "contradiction", validation="validation_matched"
    ),
    "glue/qnli": _glue("qnli", "question", "sentence", "entailment", "unrelated"),
    "glue/rte": _glue("rte", "sentence1", "sentence2", "entailment", "unrelated"),
    "openbookqa": Suite(("allenai/openbookqa", "main"), LETTERS, _multiple_choice("question_stem"), _QUESTION),
    "piqa": Suite(("ybisk/piqa", None), LETTERS[:2], _piqa, _QUESTION, revision="refs/convert/parquet"),
    "arc-e": Suite(("allenai/ai2_arc", "ARC-Easy"), LETTERS, _multiple_choice("question"), _QUESTION),
    "arc-c": Suite(("allenai/ai2_arc", "ARC-Challenge"), LETTERS, _multiple_choice("question"), _QUESTION),
    "sciq": Suite(("allenai/sciq", None), LETTERS[:4], _sciq, _QUESTION),
}


def load_suite(name: str, *, held_out: int, train: int | None = None, seed: int = 0) -> LabelledTexts:
    """The texts of a task; ``seed`` draws those held out of its validation set, and those trained on if not all are.

    Raises:
        ValueError: the data set cannot be read, or has other columns.
        MissingPackageError: ``datasets`` is not installed.
    """
    datasets = require("datasets")
    task, _, folder = name.partition("=")
    suite = SUITES[task]
    if folder and not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder}")
    try:
        found = (
            datasets.load_from_disk(folder) if folder else datasets.load_dataset(*suite.hub, revision=suite.revision)
        )
        parts = [found["train"], found[suite.validation]]
        splits = [_split(suite, rows, seed, most) for rows, most in zip(parts, (train, held_out), strict=True)]
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        way_out = "" if folder else f"; without a network: {task}=folder of save_to_disk"
        raise ValueError(f"{name} cannot be read: {type(error).__name__}: {error}{way_out}") from None
    return LabelledTexts(task, suite.classes, splits[0], splits[1], suite.prompt, suite.metric)


def _split(suite: Suite, rows: Any, seed: int, most: int | None) -> Split:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    read = [suite.read(row) for row in rows.select(order[:most])]
    if not read:
        raise ValueError("it has no rows")
    texts, pairs, labels = (list(column) for column in zip(*read, strict=True))
    return Split(texts, labels, None if pairs[0] is None else pairs)
