"""Real models and batches to measure on."""

from __future__ import annotations

import functools

import torch
from torch import nn

from meft_kernels.comparison.labelled import Split
from meft_kernels.comparison.tasks import Task
from meft_kernels.comparison.texts import load_texts

TASKS: dict[str, Task] = {}
"""By name, those that were made: reading a configuration and a tokenizer out of a GGUF file takes seconds."""


def task_of(name: str) -> Task:
    if name not in TASKS:
        TASKS[name] = Task(name, ("negative", "positive"))
    return TASKS[name]


def real_model(name: str, dtype: torch.dtype) -> nn.Module:
    """A pretrained model by the demo's name, a hub id or a path, in train mode."""
    return task_of(name).load(dtype=dtype, device=torch.device("cpu"), seed=0).train()


@functools.cache
def _reviews(rows: int, seed: int) -> Split:
    return load_texts("imdb", held_out=rows, seed=seed).held_out


def real_batch(name: str, rows: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """IMDB reviews drawn by ``seed``, cut or padded to ``tokens``: next-token labels for a causal model, or classes."""
    task = task_of(name)
    reviews = _reviews(rows, seed)
    encoded = task.tokenizer(
        reviews.texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt"
    )
    batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    if task.causal:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    else:
        batch["labels"] = torch.tensor(reviews.labels)
    return batch
