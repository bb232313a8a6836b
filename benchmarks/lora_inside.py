"""A LoRA inside the layers: the loss curve and the kept bytes, reversible against plain autograd.

    python -m benchmarks.lora_inside --model smollm2 --steps 30

The same PEFT LoRA (r = 16, all linear layers), the same batches, AdamW at the same rate, three ways:

    reversible   patch(get_peft_model(model), adapters="none")
    autograd     the same coupling, engine="autograd": plain backpropagation, every activation kept
    peft         PEFT alone, no coupling: what such a user has today

All three take a step in turn, so that a machine whose speed drifts treats them alike. Bytes are those of live tensors
after forward, the logits' and the loss's left out: those of the layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import meft_kernels
from benchmarks.real import real_batch, real_model
from meft_kernels.memory import LiveTensorMeter
from meft_kernels.patching.state import unwrap

METHODS: dict[str, dict[str, Any] | None] = {
    "reversible": {"engine": "reversible"},
    "autograd": {"engine": "autograd"},
    "peft": None,
}


def build(base: nn.Module, method: str) -> nn.Module:
    """The model with the same fresh LoRA each time."""
    torch.manual_seed(0)
    lora = LoraConfig(r=16, target_modules="all-linear")
    model: nn.Module = get_peft_model(copy.deepcopy(base), lora)
    settings = METHODS[method]
    if settings is not None:
        meft_kernels.patch(model, adapters="none", **settings)
    return model.train()


def kept_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """What the layers keep between forward and backward."""
    decoder = unwrap(model).base_model
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with LiveTensorMeter() as meter:
        output = decoder(**inputs, use_cache=False)
        kept = meter.live_bytes
    del output
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = real_model(options.model, torch.float32)
    models = {method: build(copy.deepcopy(base), method) for method in METHODS}
    del base
    optimizers = {
        method: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
        for method, model in models.items()
    }
    losses: dict[str, list[float]] = {method: [] for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    print(f"{'step':>4} " + " ".join(f"{method:>12}" for method in METHODS) + "   reversible - autograd")
    for step in range(options.steps):
        batch = real_batch(options.model, options.rows, options.tokens, seed=step)
        for method, model in models.items():
            start = time.perf_counter()
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizers[method].step()
            optimizers[method].zero_grad()
            seconds[method].append(time.perf_counter() - start)
            losses[method].append(float(loss.detach()))
        row = " ".join(f"{losses[method][-1]:12.6f}" for method in METHODS)
        print(f"{step:4d} {row}   {losses['reversible'][-1] - losses['autograd'][-1]:+.1e}", flush=True)
    kept = {method: kept_bytes(model, batch) for method, model in models.items()}
    elements = batch["input_ids"].numel() * unwrap(models["peft"]).config.hidden_size
    worst = max(abs(a - b) for a, b in zip(losses["reversible"], losses["autograd"], strict=True))
    print(f"largest difference of the reversible curve from autograd's: {worst:.1e} nats")
    for method in METHODS:
        print(
            f"{method:<12} {kept[method] / 2**20:9.1f} MiB kept after forward, {kept[method] / elements:7.1f} bytes an "
            f"element; median step {statistics.median(seconds[method]):.2f} s"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"losses": losses, "kept_bytes": kept, "seconds": seconds}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
