"""Held-out figures: accuracy of a classifier, loss and perplexity per token of a language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def predicted_class(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """``(batch,)`` int64: all that need be kept of a batch's ``(batch, classes)`` logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


class Accuracy:
    """Share of texts that are classified right; it remembers the last evaluation's, class by class.

    Not among what is logged: reporters want numbers, and names of classes may be anything.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self.by_class: list[dict[str, Any]] = []
        """A class each, in the order of the labels: ``class``, ``texts`` that have it, ``precision`` (of those taken
        for it, how many are; None where none was) and ``recall`` (of those that are, how many were found)."""

    def __call__(self, prediction: Any) -> dict[str, float]:
        found, wanted = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        self.by_class = []
        for index, name in enumerate(self._classes):
            right = int(np.sum((found == index) & (wanted == index)))
            taken, texts = int(np.sum(found == index)), int(np.sum(wanted == index))
            self.by_class.append(
                {
                    "class": name,
                    "texts": texts,
                    "precision": right / taken if taken else None,
                    "recall": right / texts if texts else None,
                }
            )
        return {"accuracy": float(np.mean(found == wanted))}


def token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """``(batch, 2)`` float64 from ``(batch, tokens, vocabulary)``: each row's summed loss, and of how many tokens."""
    scores = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1]
    targets = labels[:, 1:]
    # A row at a time: in float32 the logits of a large vocabulary are most of the memory that evaluation takes.
    sums = [
        torch.nn.functional.cross_entropy(row.float(), wanted, reduction="sum", ignore_index=-100)
        for row, wanted in zip(scores, targets, strict=True)
    ]
    return torch.stack([torch.stack(sums).double(), (targets != -100).sum(-1).double()], dim=-1)


def perplexity(prediction: Any) -> dict[str, float]:
    """Mean loss of all held-out tokens, and its exponential.

    A Trainer's own ``eval_loss`` is a mean of batches' means, in which a token of a batch of short texts counts more;
    this one takes its place in what ``evaluate`` returns.
    """
    total, tokens = prediction.predictions.sum(axis=0)
    loss = float(total / tokens)
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
