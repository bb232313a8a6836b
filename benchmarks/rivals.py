"""What people would use instead, each on a copy of the same model; and real models and batches to try them on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import meft_kernels
from meft_kernels.demo.data import load_texts
from meft_kernels.demo.models import Task


def meft(model: nn.Module, **settings: Any) -> nn.Module:
    """Ours, at its defaults."""
    return meft_kernels.patch(copy.deepcopy(model), **settings)


def lora(model: nn.Module) -> Any:
    """PEFT LoRA, r = 16 in every linear layer: trains few parameters and keeps every activation."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(copy.deepcopy(model), LoraConfig(r=16, target_modules="all-linear"))


def lora_checkpointing(model: nn.Module) -> nn.Module:
    """The same with non-reentrant gradient checkpointing of every layer: keeps one activation a layer."""
    wrapped = lora(model)
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped.enable_input_require_grads()
    return wrapped


RIVALS: dict[str, Callable[..., nn.Module]] = {
    "meft": meft,
    "lora": lora,
    "lora_checkpointing": lora_checkpointing,
}


def real_model(name: str, dtype: torch.dtype) -> nn.Module:
    """A pretrained model by the demo's name, a hub id or a path, in train mode."""
    return Task(name, ("negative", "positive")).load(dtype=dtype, device=torch.device("cpu"), seed=0).train()


@functools.cache
def _task(name: str, tokens: int) -> Task:
    """Reading a tokenizer out of a GGUF file takes seconds."""
    return Task(name, ("negative", "positive"), max_length=tokens)


def real_batch(name: str, rows: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """IMDB reviews drawn by ``seed``, cut or padded to ``tokens``: next-token labels for a causal model, or classes."""
    task = _task(name, tokens)
    reviews = load_texts("imdb", held_out=rows, seed=seed).held_out
    encoded = task.tokenizer(
        reviews.texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt"
    )
    batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    if task.causal:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    else:
        batch["labels"] = torch.tensor(reviews.labels)
    return batch
