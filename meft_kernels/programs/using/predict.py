"""Classes of texts, with their probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def class_names(model: Any) -> list[str]:
    """In the order of the labels.

    Raises:
        ValueError: what the model gives are no classes of which one is chosen.
    """
    names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    kind = getattr(model.config, "problem_type", None)
    if len(names) < 2 or kind not in (None, "single_label_classification"):
        raise ValueError(f"this model chooses none of several classes: num_labels {len(names)}, problem_type {kind}")
    return names


def probabilities(
    model: Any, tokenizer: Any, batches: Iterable[Sequence[str]], max_length: int
) -> Iterable[list[float]]:
    """Of each text in turn, its classes' in the order of the labels; a text is cut off after ``max_length`` tokens."""
    for texts in batches:
        inputs = tokenizer(list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs.to(model.device)).logits
        yield from logits.float().softmax(-1).tolist()
