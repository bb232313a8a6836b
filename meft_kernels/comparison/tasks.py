"""Pretrained models by name or path, and how each kind of model is asked for the class of a text.

An encoder gets a new classification head. A causal language model needs none: after a prompt, the next token is the
name of the class, and the loss is on that token only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn

from ..pretrained import find_pretrained
from .texts import Split

Batch = dict[str, Any]


class Task:
    """Classifying texts with one kind of model: makes models, batches, and predictions."""

    def __init__(self, name: str, classes: tuple[str, ...], *, max_length: int = 128) -> None:
        self.pretrained = find_pretrained(name)
        self.classes = classes
        self.max_length = max_length
        self.tokenizer = self.pretrained.tokenizer
        self.causal = self.pretrained.causal
        self.answers = self._answer_tokens() if self.causal else []

    def _answer_tokens(self) -> list[int]:
        """The first token of each class's name as it follows the prompt."""
        tokens = [self.tokenizer(f" {name}", add_special_tokens=False).input_ids[0] for name in self.classes]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"the classes {', '.join(self.classes)} do not differ in their first token for this model")
        return tokens

    def load(self, *, dtype: torch.dtype, device: torch.device, seed: int | None = None) -> nn.Module:
        """A fresh pretrained model. ``seed`` fixes the first weights of a new classification head."""
        if seed is not None:
            torch.manual_seed(seed)
        if self.causal:
            model = self.pretrained.load(transformers.AutoModelForCausalLM, dtype=dtype)
        else:
            auto = transformers.AutoModelForSequenceClassification
            model = self.pretrained.load(auto, dtype=dtype, num_labels=len(self.classes))
        # On the class, because patching rebinds nothing there but PEFT wraps the object.
        self._short_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        placed: nn.Module = model.to(device)
        return placed

    def batch(self, split: Split, indices: list[int], device: torch.device) -> Batch:
        """The keyword arguments of the model's forward, ``labels`` among them."""
        texts = [split.texts[i] for i in indices]
        labels = torch.tensor([split.labels[i] for i in indices])
        if self.causal:
            made = self._prompts(texts, labels)
        else:
            options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
            made = {**self.tokenizer(texts, **options), "labels": labels}
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in made.items()}

    def _prompts(self, texts: list[str], labels: torch.Tensor) -> Batch:
        """Prompt and answer, padded on the left so that every answer is the last token."""
        head = self.tokenizer("Review:").input_ids
        tail = self.tokenizer("\nSentiment:", add_special_tokens=False).input_ids
        room = self.max_length - len(head) - len(tail) - 1
        rows = [
            [*head, *self.tokenizer(f" {text}", add_special_tokens=False).input_ids[:room], *tail, self.answers[label]]
            for text, label in zip(texts, labels.tolist(), strict=True)
        ]
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, width - len(row) :] = torch.tensor(row)
            attention_mask[i, width - len(row) :] = 1
        keep = 2 if self._short_logits else width  # the token that predicts the answer, and the answer
        targets = torch.full((len(rows), keep), -100)
        targets[:, -1] = input_ids[:, -1]
        batch: Batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": targets}
        return {**batch, "logits_to_keep": keep} if self._short_logits else batch

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        """The index of the class that the model prefers, for each text of a batch."""
        return (logits[:, -2, self.answers] if self.causal else logits).argmax(-1)

    def accuracy(self, model: nn.Module, split: Split, *, batch_size: int, device: torch.device) -> float:
        """Percent of ``split`` that the model gets right, in eval mode; the model's mode is put back."""
        was_training = model.training
        model.eval()
        by_length = sorted(range(len(split)), key=lambda i: len(split.texts[i]))
        right = 0
        with torch.no_grad():
            for start in range(0, len(split), batch_size):
                indices = by_length[start : start + batch_size]
                logits = model(**self.batch(split, indices, device)).logits
                expected = torch.tensor([split.labels[i] for i in indices], device=device)
                right += int((self.predictions(logits) == expected).sum())
        model.train(was_training)
        return 100 * right / len(split)
