"""TRL's trainers with a LoRA: the same losses and rewards with reversible layers and without.

    python -m benchmarks.trl_lora --steps 5 --trainers grpo dpo kto sft

The same PEFT LoRA (r = 16, all linear layers, B drawn so that it already does something) in SmolLM2, the same rows, and
the same random numbers, three ways:

    reversible   meft_kernels.reversible(get_peft_model(model))
    autograd     the same function under plain backpropagation, engine="autograd": all that may differ is rounding
    peft         PEFT alone; it differs by the coupling's leak, a 256th of the streams' difference

Needs `pip install trl`. Rewards of GRPO are those of texts that the model samples while it learns: where two runs'
weights differ by rounding a sample may part from the other's, and its reward with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import meft_kernels
from meft_kernels.comparison.texts import load_texts
from meft_kernels.packages import require
from meft_kernels.pretrained import find_model

trl = require("trl", "pip install trl")

WAYS: dict[str, dict[str, Any] | None] = {
    "reversible": {"engine": "reversible"},
    "autograd": {"engine": "autograd"},
    "peft": None,
}


def build(model: Any, way: str) -> Any:
    """The model with the same LoRA each time."""
    torch.manual_seed(0)
    made = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    settings = WAYS[way]
    return made if settings is None else meft_kernels.reversible(made, **settings)


def short_and_varied(completions: list[str], **_: Any) -> list[float]:
    """The reward: how many different words."""
    return [float(len(set(text.split()))) for text in completions]


def grpo(model: Any, tokenizer: Any, rows: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    settings = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 12, "beta": 0.04}
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    return trl.GRPOTrainer(
        model, short_and_varied, trl.GRPOConfig(**common, **settings), prompts, processing_class=tokenizer
    )


def dpo(model: Any, tokenizer: Any, rows: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    settings = trl.DPOConfig(**common, per_device_train_batch_size=4)
    return trl.DPOTrainer(model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def kto(model: Any, tokenizer: Any, rows: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    judged = [
        {"prompt": r["prompt"], "completion": r[kind], "label": kind == "chosen"}
        for r in rows
        for kind in ("chosen", "rejected")
    ]
    settings = trl.KTOConfig(**common, per_device_train_batch_size=4)
    return trl.KTOTrainer(model, args=settings, train_dataset=Dataset.from_list(judged), processing_class=tokenizer)


def sft(model: Any, tokenizer: Any, rows: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    pairs = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    settings = trl.SFTConfig(**common, per_device_train_batch_size=4)
    return trl.SFTTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer)


TRAINERS: dict[str, Callable[[Any, Any, list[dict[str, Any]], dict[str, Any]], Any]] = {
    "grpo": grpo,
    "dpo": dpo,
    "kto": kto,
    "sft": sft,
}
SHOWN = ("loss", "reward", "kl", "rewards/margins", "rewards/accuracies", "grad_norm")


def load(name: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Model, tokenizer, and pairs of answers."""
    source = find_model(name)
    tokenizer = AutoTokenizer.from_pretrained(source.path, **source.options())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source.path, **source.model_options(), dtype=torch.float32)
    texts = load_texts("rotten_tomatoes", held_out=1)
    pairs = zip(texts.train.texts[:64], texts.train.labels[:64], strict=True)
    rows = [
        {
            "prompt": f"Review: {text}\nSentiment:",
            "chosen": f" {texts.classes[label]}",
            "rejected": f" {texts.classes[label - 1]}",
        }
        for text, label in pairs
    ]
    return model, tokenizer, rows


def run(trainer: str, way: str, loaded: tuple[Any, Any, list[dict[str, Any]]], steps: int) -> list[dict[str, float]]:
    """What the trainer logs, step by step."""
    base, tokenizer, rows = loaded
    model = build(copy.deepcopy(base), way)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "max_steps": steps,
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "bf16": False,
            "disable_tqdm": True,
            "seed": 1,
        }
        made = TRAINERS[trainer](model, tokenizer, rows, common)
        made.train()
    return [
        {name: entry[name] for name in SHOWN if name in entry} for entry in made.state.log_history if "loss" in entry
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=["grpo", "dpo"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = load(options.model)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in options.trainers:
        found[name] = {way: run(name, way, loaded, options.steps) for way in WAYS}
        print(f"\n{name}")
        for figure in found[name]["peft"][0]:
            print(f"{'step':>4} " + " ".join(f"{way:>12}" for way in WAYS) + f"   {figure}")
            for step, entries in enumerate(zip(*found[name].values(), strict=True), 1):
                print(f"{step:4d} " + " ".join(f"{entry[figure]:12.6f}" for entry in entries))
            for other in ("autograd", "peft"):
                pairs = zip(found[name]["reversible"], found[name][other], strict=True)
                print(f"     largest difference from {other}: {max(abs(a[figure] - b[figure]) for a, b in pairs):.1e}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
