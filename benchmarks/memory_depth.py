"""Bytes of live tensors after forward and at the peak, by depth: reversible against PEFT LoRA and checkpointing.

    python -m benchmarks.memory_depth --layers 4 24

A random Llama (H = 512, bf16, 4 x 512 tokens) without its head, so that only the layers count. B/elt is bytes per
element of the hidden states. Works on any device: bytes are counted tensor by tensor, not asked of an allocator.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS, Budget
from meft_kernels.memory import LiveTensorMeter
from meft_kernels.state import unwrap

HIDDEN_SIZE = 512


def measure(name: str, layers: int, rows: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """One training step of the decoder alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=HIDDEN_SIZE, intermediate_size=1408, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, attn_implementation="sdpa",
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(dtype).train()
    budget = Budget.of(base, MeftConfig(arithmetic="float" if name == "meft_float" else "exact"))
    model = RIVALS["meft" if name == "meft_float" else name].prepare(base, budget)
    decoder = unwrap(model).model
    ids = torch.randint(0, config.vocab_size, (rows, tokens))

    def loss() -> torch.Tensor:
        return decoder(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean()

    if name.startswith("meft"):
        with torch.no_grad():
            loss()  # chooses fraction_bits
    with LiveTensorMeter() as meter:
        value = loss()
        kept = meter.live_bytes
        value.backward()
    elements = rows * tokens * HIDDEN_SIZE
    return {"rival": name, "layers": layers, "kept": kept / elements, "peak": meter.peak_bytes / elements}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--rivals", nargs="+", default=["meft", "meft_float", "lora_checkpointing"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for rival in options.rivals:
        for layers in options.layers:
            figures = measure(rival, layers, options.rows, options.tokens, getattr(torch, options.dtype))
            print(
                "{rival:<20} {layers:3d} layers   after forward {kept:8.2f} B/elt   peak {peak:8.1f} B/elt".format(
                    **figures
                )
            )
            results.append(figures)
        mine = [figures for figures in results if figures["rival"] == rival]
        if len(mine) > 1:
            growth = (mine[-1]["kept"] - mine[0]["kept"]) / (mine[-1]["layers"] - mine[0]["layers"])
            print(f"{rival:<20} grows by {growth:.4f} B/elt and layer", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
