"""What a training step takes, by what trains: plain, with gradient checkpointing, reversible.

    python -m benchmarks.trainable_parts --model llama-3.2-1b --rows 1 --tokens 4096

Simulated, as `meft-kernels estimate` does it: no weights, no GPU. The loss is in chunks for all of them. MiB of
tensors: kept between forward and backward; peak of forward and backward beside the weights, gradients of what trains
among it; AdamW states apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import meft_kernels
from meft_kernels.comparison.rivals.lora_checkpointing import checkpoint
from meft_kernels.estimate.estimator import SIMULATED_BITS
from meft_kernels.estimate.shapes import find_config
from meft_kernels.estimate.step import measure_step, text_batch
from meft_kernels.estimate.twin import bare_twin, simulation
from meft_kernels.loss import bind_loss
from meft_kernels.patching.state import count_parameters


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))


def only(chosen: Callable[[str], bool]) -> Callable[[Any], Any]:
    def prepare(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen(name))
        return model

    return prepare


def parts(layers: int) -> dict[str, Callable[[Any], Any]]:
    """What trains, by name."""
    top = tuple(f".layers.{index}." for index in range(layers - layers // 4, layers))
    return {
        "a LoRA, r = 16, all linear layers": lora,
        "norms": only(lambda name: "norm" in name),
        "the top quarter of the layers": only(lambda name: any(place in name for place in top)),
        "everything": only(lambda name: True),
    }


def plain(model: Any) -> None:
    bind_loss(model)


def checkpointing(model: Any) -> None:
    bind_loss(model)
    checkpoint(model)


def reversible(model: Any) -> None:
    meft_kernels.reversible(model, fraction_bits=SIMULATED_BITS)


WAYS: dict[str, Callable[[Any], None]] = {
    "plain": plain,
    "checkpointing": checkpointing,
    "reversible": reversible,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    config = find_config(options.model)
    print(f"| what trains | parameters | AdamW | {' | '.join(f'{way}: kept, peak' for way in WAYS)} |")
    print("| --- " * (3 + len(WAYS)) + "|")
    for name, prepare in parts(config.num_hidden_layers).items():
        cells = []
        for way in WAYS.values():
            with simulation(gpu=True):
                model = prepare(bare_twin(config, getattr(torch, options.dtype)))
                way(model)
                batch = text_batch(model, options.rows, options.tokens, torch.device("cpu"))
                found = measure_step(model.train(), batch, foreach=True)
            cells.append(f"{found.kept / 2**20:,.0f}, {found.peak / 2**20:,.0f}")
        states = f"{found.optimizer / 2**20:,.0f}"
        print(f"| {name} | {count_parameters(model)[0]:,} | {states} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
