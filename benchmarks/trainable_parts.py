"""What a training step keeps and takes at most, by what trains: plain, with gradient checkpointing, reversible.

    python -m benchmarks.trainable_parts --model smollm2 --rows 1 --tokens 512

MiB of live tensors beside the weights (`meft_kernels.comparison.loop.footprint`), with the loss in chunks for all of
them; gradients of what trains are in the peak, an optimizer's states are not (two more of the trained, in float32, for
AdamW).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import meft_kernels
from benchmarks.real import real_batch, real_model
from meft_kernels.comparison.loop import footprint
from meft_kernels.loss import bind_loss
from meft_kernels.state import count_parameters


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
    top = tuple(f".layers.{index}." for index in range(layers - 2, layers))
    return {
        "a LoRA, r = 16, all linear layers": lora,
        "norms": only(lambda name: "norm" in name),
        "the top two layers": only(lambda name: any(place in name for place in top)),
        "all layers": only(lambda name: ".layers." in name),
        "everything": only(lambda name: True),
    }


def plain(model: Any) -> None:
    bind_loss(model)


def checkpointing(model: Any) -> None:
    bind_loss(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})


WAYS: dict[str, Callable[[Any], Any]] = {
    "plain": plain,
    "checkpointing": checkpointing,
    "reversible": meft_kernels.reversible,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    batch = real_batch(options.model, options.rows, options.tokens)
    layers = real_model(options.model, torch.float32).config.num_hidden_layers
    print("| what trains | parameters | " + " | ".join(f"{way}: kept, peak" for way in WAYS) + " |")
    print("| --- " * (2 + len(WAYS)) + "|")
    for name, prepare in parts(layers).items():
        cells = []
        for way in WAYS.values():
            model = prepare(real_model(options.model, torch.float32))
            way(model)
            if way is meft_kernels.reversible:
                meft_kernels.calibrate(model, batch)
            found = footprint(model, batch)
            cells.append(f"{found.kept / 2**20:,.1f}, {found.peak / 2**20:,.1f}")
        print(f"| {name} | {count_parameters(model)[0]:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
