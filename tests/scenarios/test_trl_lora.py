"""TRL's trainers with a PEFT LoRA in reversible layers: the losses and weights of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels

from ..models import relative_error, tiny_llama
from .test_trl import PAIRS, TEXTS, adapters, arguments, losses, reward_base, tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def rows(given: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(given)


def different_words(completions: list[str], **_: Any) -> list[float]:
    return [-float(len(set(text.split()))) for text in completions]


def sft(model: Any, common: dict[str, Any]) -> Any:
    return trl.SFTTrainer(model, trl.SFTConfig(**common), train_dataset=rows(TEXTS), processing_class=tokenizer())


def dpo(model: Any, common: dict[str, Any]) -> Any:
    return trl.DPOTrainer(model, args=trl.DPOConfig(**common), train_dataset=rows(PAIRS), processing_class=tokenizer())


def kto(model: Any, common: dict[str, Any]) -> Any:
    judged = [
        {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
        for pair in PAIRS
        for kind in ("chosen", "rejected")
    ]
    return trl.KTOTrainer(model, args=trl.KTOConfig(**common), train_dataset=rows(judged), processing_class=tokenizer())


def grpo(model: Any, common: dict[str, Any]) -> Any:
    settings = {
        **common,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "beta": 0.1,
    }
    prompts = rows([{"prompt": pair["prompt"]} for pair in PAIRS])
    config = trl.GRPOConfig(**settings, temperature=1.5)
    return trl.GRPOTrainer(model, different_words, config, train_dataset=prompts, processing_class=tokenizer())


def reward(model: Any, common: dict[str, Any]) -> Any:
    return trl.RewardTrainer(model, trl.RewardConfig(**common), train_dataset=rows(PAIRS), processing_class=tokenizer())


TRAINERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "sft": sft,
    "dpo": dpo,
    "kto": kto,
    "grpo": grpo,
    "reward": reward,
}


@pytest.mark.parametrize("name", TRAINERS)
def test_as_plain_autograd(name: str, tmp_path: Path) -> None:
    """References, of DPO, KTO and GRPO, are TRL's own: a copy of the adapter, switched to and back."""
    curves, weights, logs = [], [], []
    for engine in ("reversible", "autograd"):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=4,
            target_modules="all-linear",
            task_type="SEQ_CLS" if name == "reward" else "CAUSAL_LM",
            init_lora_weights=False,
        )
        model = peft.get_peft_model(reward_base() if name == "reward" else tiny_llama(2, 32), config)
        meft_kernels.reversible(model, engine=engine, fraction_bits=18)
        start = adapters(model)
        # Adam makes a whole step of a gradient that is rounding alone, unless its epsilon is above that.
        settings = arguments(tmp_path / engine, max_steps=3, save_strategy="no", adam_epsilon=1e-3)
        trainer = TRAINERS[name](model, settings)
        trainer.train()
        curves.append(losses(trainer))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        weights.append(adapters(model))
    assert len(curves[0]) == 3
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    for figure in ("reward", "rewards/margins"):
        assert [e.get(figure) for e in logs[0]] == pytest.approx([e.get(figure) for e in logs[1]], abs=1e-3)
    assert relative_error(*weights) <= 1e-3
    assert relative_error(weights[0], {name: start[name] for name in weights[0]}) > 1e-3
    if name in ("dpo", "kto", "grpo"):
        assert "ref" in model.peft_config
