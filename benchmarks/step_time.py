"""Time and peak memory of one training step: reversible against PEFT LoRA, with checkpointing and without.

    python -m benchmarks.step_time --model smollm2 --rows 4 --tokens 256 --rounds 7
    python -m benchmarks.step_time --rows 1 --tokens 2048 --rivals meft lora_chunked meft:tile=off meft:attention=pieces

All rivals are built first and take turns, one forward and backward each a round, so that a machine whose speed drifts
treats them alike. Printed are medians, the peak of live tensors beside weights, and the median over rounds of each
rival's ratio to ours *within* a round. Settings of ``MeftConfig`` stand behind a rival's name, as above.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.real import real_batch, real_model
from meft_kernels import MeftConfig
from meft_kernels.comparison.loop import Footprint, footprint
from meft_kernels.comparison.records import Record
from meft_kernels.comparison.rivals import RIVALS, Budget
from meft_kernels.comparison.timing import Times, interleaved
from meft_kernels.programs.commands.shared import settings_of


def stepper(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A forward and a backward, without an optimiser."""

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def prepared(rival: str, base: nn.Module, budget: Budget) -> nn.Module:
    """A copy of the model as the rival trains it, with the settings behind its name."""
    name, _, settings = rival.partition(":")
    if name not in RIVALS:
        raise SystemExit(f"{name} is none of the rivals {', '.join(RIVALS)}")
    config = budget.config.changed(**settings_of(settings.split(",") if settings else None))
    return RIVALS[name].prepare(copy.deepcopy(base), dataclasses.replace(budget, config=config)).train()


def run(
    name: str, rivals: list[str], rows: int, tokens: int, rounds: int, dtype: torch.dtype, device: torch.device
) -> tuple[Times, dict[str, Footprint]]:
    """Interleaved step times of the rivals on one real batch, and what a step of each has alive."""
    base = real_model(name, dtype).to(device)
    batch = {key: value.to(device) for key, value in real_batch(name, rows, tokens).items()}
    budget = Budget.of(base, MeftConfig())
    models = {rival: prepared(rival, base, budget) for rival in rivals}
    for model in models.values():
        model(**batch)  # which calibrates
    memory = {rival: footprint(model, batch) for rival, model in models.items()}
    steps = {rival: stepper(model, batch) for rival, model in models.items()}
    return interleaved(steps, rounds=rounds, device=device), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="minilm, smollm2, or a hub id or path")
    parser.add_argument("--rivals", nargs="+", default=["meft", "lora_checkpointing", "lora"], metavar="RIVAL")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    times, memory = run(options.model, options.rivals, options.rows, options.tokens, options.rounds, dtype, device)
    ours = options.rivals[0]
    over = {rival: times.ratios(rival)[ours] for rival in options.rivals}
    for rival, median in times.medians.items():
        spread = times.seconds[rival]
        peak = memory[rival].peak / 2**20
        print(f"{rival:<28} {median:8.3f} s   ({min(spread):.3f} to {max(spread):.3f})  peak {peak:8.1f} MiB")
    for rival in options.rivals[1:]:
        smaller = memory[ours].peak / memory[rival].peak
        print(f"{ours} / {rival}: time {over[rival]:.3f}, peak {smaller:.3f}")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        figures = {
            "seconds": times.seconds,
            "medians": times.medians,
            f"{ours}_over": over,
            "peak_bytes": {rival: each.peak for rival, each in memory.items()},
            "kept_bytes": {rival: each.kept for rival, each in memory.items()},
        }
        Record.now("step_time_alone", settings, figures, device).write(options.json)


if __name__ == "__main__":
    main()
