"""Labelled texts: what tasks train on and are measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Metric = Literal["accuracy", "correlation", "loss"]


@dataclass(frozen=True)
class Split:
    """Texts, second texts where they are pairs, and the index of each one's class (a number where there are none)."""

    texts: list[str]
    labels: list[Any]
    pairs: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: list[int]) -> Split:
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return Split([self.texts[i] for i in indices], [self.labels[i] for i in indices], pairs)


@dataclass(frozen=True)
class Prompt:
    """What a causal model reads around a text, before it names the class: ``head text [middle pair] tail class``."""

    head: str = "Review:"
    tail: str = "\nSentiment:"
    middle: str = "\nSecond:"


@dataclass(frozen=True)
class LabelledTexts:
    """A training set, a held-out set that shares no text with it, and the names of the classes."""

    name: str
    classes: tuple[str, ...]
    train: Split
    held_out: Split
    prompt: Prompt = Prompt()
    metric: Metric = "accuracy"
