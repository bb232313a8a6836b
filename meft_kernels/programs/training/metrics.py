"""Held-out figures: accuracy of a classifier, loss and perplexity per token of a language model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def predicted_class(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """``(batch,)`` int64: all that need be kept of a batch's ``(batch, classes)`` logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of texts that are classified right."""
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


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
