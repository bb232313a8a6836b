"""Pretrained models by name or path, and what each kind of model is asked: the class of a text, or its next tokens.

An encoder gets a new classification head. A causal language model needs none: after a prompt, the next token is the
name of the class, and the loss is on that token only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from ..pretrained import find_pretrained
from ..programs.training.metrics import token_losses
from .labelled import LabelledTexts, Metric, Prompt, Split

Batch = dict[str, Any]


class Task:
    """Classifying texts with one kind of model: makes models, batches, and predictions.

    Without classes it is a regression, which encoders alone can do.
    """

    higher_is_better = True

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        *,
        max_length: int = 128,
        prompt: Prompt | None = None,
        metric: Metric = "accuracy",
    ) -> None:
        self.pretrained = find_pretrained(name)
        self.classes = classes
        self.max_length = max_length
        self.prompt = prompt or Prompt()
        self.metric = metric
        self.tokenizer = self.pretrained.tokenizer
        self.causal = self.pretrained.causal
        if self.causal and not classes:
            raise ValueError(f"{name} is a causal language model, which names classes: a regression is for encoders")
        self.answers = self._answer_tokens() if self.causal else []
        known = transformers.AutoModelForCausalLM._model_mapping
        made = known.get(type(self.pretrained.config), None)
        self._short_logits = made is not None and "logits_to_keep" in inspect.signature(made.forward).parameters

    @classmethod
    def of(cls, name: str, texts: LabelledTexts, *, max_length: int = 128) -> Task:
        """The task that the texts are for."""
        return cls(name, texts.classes, max_length=max_length, prompt=texts.prompt, metric=texts.metric)

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
            model = self.pretrained.load(auto, dtype=dtype, num_labels=len(self.classes) or 1)
        placed: nn.Module = model.to(device)
        return placed

    def batch(self, split: Split, indices: list[int], device: torch.device) -> Batch:
        """The keyword arguments of the model's forward, ``labels`` among them."""
        chosen = split.take(indices)
        labels = torch.tensor(chosen.labels, dtype=torch.long if self.classes else torch.float32)
        if self.causal:
            made = self._prompts(chosen, labels)
        else:
            options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
            made = {**self.tokenizer(chosen.texts, chosen.pairs, **options), "labels": labels}
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in made.items()}

    def _prompts(self, split: Split, labels: torch.Tensor) -> Batch:
        """Prompt and answer, padded on the left so that every answer is the last token. Long texts lose their end."""

        def tokens(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)

        head, tail = self.tokenizer(self.prompt.head).input_ids, tokens(self.prompt.tail)
        middle = [] if split.pairs is None else tokens(self.prompt.middle)
        room = self.max_length - len(head) - len(middle) - len(tail) - 1
        seconds = split.pairs or [""] * len(split)
        rows = []
        for text, second, label in zip(split.texts, seconds, labels.tolist(), strict=True):
            after = tokens(f" {second}")[: room // 2] if middle else []
            rows.append([*head, *tokens(f" {text}")[: room - len(after)], *middle, *after, *tail, self.answers[label]])
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
        """The index of the class that the model prefers, for each text of a batch; a regression's number."""
        if not self.classes:
            return logits.squeeze(-1)
        return (logits[:, -2, self.answers] if self.causal else logits).argmax(-1)

    def predicted(self, model: nn.Module, split: Split, *, batch_size: int, device: torch.device) -> torch.Tensor:
        """``[len(split)]`` float64: what the model prefers for each text, in eval mode; its mode is put back."""
        predicted = torch.zeros(len(split), dtype=torch.float64)
        for indices, _, output in self._outputs(model, split, batch_size, device):
            predicted[indices] = self.predictions(output.logits).double().cpu()
        return predicted

    def score(self, model: nn.Module, split: Split, *, batch_size: int, device: torch.device) -> float:
        """Percent of ``split`` that the model gets right, or 100 times the correlation."""
        predicted = self.predicted(model, split, batch_size=batch_size, device=device)
        expected = torch.tensor(split.labels, dtype=torch.float64)
        if self.metric == "accuracy":
            return 100 * float((predicted == expected).double().mean())
        correlation = float(torch.corrcoef(torch.stack([predicted, expected]))[0, 1])
        return 0.0 if math.isnan(correlation) else 100 * correlation  # every prediction is the same

    def _outputs(
        self, model: nn.Module, split: Split, batch_size: int, device: torch.device
    ) -> Iterator[tuple[list[int], Batch, Any]]:
        """What the model gives for each batch, texts of like length together."""
        was_training = model.training
        model.eval()
        by_length = sorted(range(len(split)), key=lambda i: len(split.texts[i]))
        for start in range(0, len(split), batch_size):
            indices = by_length[start : start + batch_size]
            batch = self.batch(split, indices, device)
            with torch.no_grad():
                output = model(**batch)
            yield indices, batch, output
        model.train(was_training)


class LanguageTask(Task):
    """The next token of plain texts; the score is the mean loss of all held-out tokens, in nats."""

    higher_is_better = False

    def __init__(self, name: str, *, max_length: int = 128) -> None:
        super().__init__(name, ("no", "yes"), max_length=max_length, metric="loss")
        if not self.causal:
            raise ValueError(f"{name} is no causal language model")

    def batch(self, split: Split, indices: list[int], device: torch.device) -> Batch:
        """Texts as they are, padded on the right."""
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        encoded = self.tokenizer([split.texts[i] for i in indices], padding_side="right", **options)
        ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def losses(self, model: nn.Module, split: Split, *, batch_size: int, device: torch.device) -> torch.Tensor:
        """``[len(split), 2]`` float64: each text's summed loss, and of how many tokens, in eval mode."""
        losses = torch.zeros(len(split), 2, dtype=torch.float64)
        for indices, batch, output in self._outputs(model, split, batch_size, device):
            losses[indices] = token_losses(output.logits, batch["labels"]).cpu()
        return losses

    def score(self, model: nn.Module, split: Split, *, batch_size: int, device: torch.device) -> float:
        """Nats per token; lower is better."""
        total, tokens = self.losses(model, split, batch_size=batch_size, device=device).sum(0).tolist()
        return float(total / tokens)
