"""Time of one training step: reversible against PEFT LoRA, with and without gradient checkpointing.

    python -m benchmarks.step_time --model smollm2 --rows 4 --tokens 256 --rounds 7

All rivals are built first and take turns, one step each a round, so that a machine whose speed drifts treats them
alike. Printed are medians, and the median over rounds of each rival's ratio to ours *within* a round.
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
from torch import nn

from benchmarks.real import real_batch, real_model
from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS, Budget


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of a forward and a backward."""
    on_gpu = batch["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**batch).loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def run(name: str, rivals: list[str], rows: int, tokens: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Interleaved step times of the rivals on one real batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = real_model(name, dtype).to(device)
    batch = {key: value.to(device) for key, value in real_batch(name, rows, tokens).items()}
    budget = Budget.of(base, MeftConfig())
    models = {rival: RIVALS[rival].prepare(copy.deepcopy(base), budget).train() for rival in rivals}
    times: dict[str, list[float]] = {rival: [] for rival in rivals}
    for round_ in range(rounds + 1):
        for rival, model in models.items():
            seconds = step(model, batch)
            if round_:  # the first is warm-up
                times[rival].append(seconds)
    medians = {rival: statistics.median(values) for rival, values in times.items()}
    ours = rivals[0]
    ratios = {
        rival: statistics.median(a / b for a, b in zip(times[ours], times[rival], strict=True)) for rival in rivals[1:]
    }
    return {
        "model": name,
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "rows": rows,
        "tokens": tokens,
        "seconds": times,
        "median_seconds": medians,
        f"{ours}_over": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="minilm, smollm2, or a hub id or path")
    parser.add_argument("--rivals", nargs="+", default=["meft", "lora_checkpointing", "lora"], choices=sorted(RIVALS))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    result = run(
        options.model, options.rivals, options.rows, options.tokens, options.rounds, getattr(torch, options.dtype)
    )
    for rival, median in result["median_seconds"].items():
        spread = result["seconds"][rival]
        print(f"{rival:<20} {median:8.3f} s   ({min(spread):.3f} to {max(spread):.3f})")
    for rival, ratio in result[f"{options.rivals[0]}_over"].items():
        print(f"{options.rivals[0]} / {rival}: {ratio:.3f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
