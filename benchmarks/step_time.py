"""Time of one training step: reversible against PEFT LoRA, with and without gradient checkpointing.

    python -m benchmarks.step_time --model smollm2 --rows 4 --tokens 256 --rounds 7

All rivals are built first and take turns, one forward and backward each a round, so that a machine whose speed drifts
treats them alike. Printed are medians, and the median over rounds of each rival's ratio to ours *within* a round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.real import real_batch, real_model
from meft_kernels import MeftConfig
from meft_kernels.comparison.records import Record
from meft_kernels.comparison.rivals import RIVALS, Budget
from meft_kernels.comparison.timing import Times, interleaved


def stepper(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A forward and a backward, without an optimiser."""

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def run(
    name: str, rivals: list[str], rows: int, tokens: int, rounds: int, dtype: torch.dtype, device: torch.device
) -> Times:
    """Interleaved step times of the rivals on one real batch."""
    base = real_model(name, dtype).to(device)
    batch = {key: value.to(device) for key, value in real_batch(name, rows, tokens).items()}
    budget = Budget.of(base, MeftConfig())
    models = {rival: RIVALS[rival].prepare(copy.deepcopy(base), budget).train() for rival in rivals}
    steps = {rival: stepper(model, batch) for rival, model in models.items()}
    return interleaved(steps, rounds=rounds, device=device)


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    times = run(options.model, options.rivals, options.rows, options.tokens, options.rounds, dtype, device)
    ours = options.rivals[0]
    over = {rival: times.ratios(rival)[ours] for rival in options.rivals}
    for rival, median in times.medians.items():
        spread = times.seconds[rival]
        print(f"{rival:<20} {median:8.3f} s   ({min(spread):.3f} to {max(spread):.3f})")
    for rival in options.rivals[1:]:
        print(f"{ours} / {rival}: {over[rival]:.3f}")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        figures = {"seconds": times.seconds, "medians": times.medians, f"{ours}_over": over}
        Record.now("step_time_alone", settings, figures, device).write(options.json)


if __name__ == "__main__":
    main()
