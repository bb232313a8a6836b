"""The memory estimator against measurement: training steps of whole models with real tensors, on the CPU.

    python -m benchmarks.estimator

Each point is one step of AdamW after another, so that the second has the state of the first, under LiveTensorMeter. The
estimate is what ``meft-kernels estimate`` computes, from fewer layers and without data, with the allocations of a CPU.
Weights are random where a real model's shapes are known: memory does not depend on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, OPTConfig

from meft_kernels import MeftConfig
from meft_kernels.comparison.records import Record
from meft_kernels.comparison.rivals import RIVALS, Budget
from meft_kernels.estimate.estimator import Estimator
from meft_kernels.estimate.shapes import find_config
from meft_kernels.estimate.step import StepBytes, tensor_bytes, text_batch
from meft_kernels.estimate.twin import build
from meft_kernels.memory import LiveTensorMeter

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results" / "estimator"

# model, dtype, rows, tokens, rival
POINTS = (
    ("minilm", "float32", 8, 128, "full"),
    ("minilm", "float32", 8, 128, "lora"),
    ("minilm", "float32", 8, 256, "meft"),
    ("minilm", "bfloat16", 4, 512, "meft1"),
    ("smollm2", "float32", 1, 256, "meft"),
    ("smollm2", "float32", 1, 256, "lora_checkpointing"),
    ("smollm2", "bfloat16", 1, 256, "lora"),
    ("smollm2", "bfloat16", 2, 128, "meft_lora"),
    ("llama-24", "float32", 1, 256, "full"),
    ("llama-24", "float32", 1, 512, "meft"),
    ("llama-24", "bfloat16", 1, 512, "meft3"),
    ("llama-24", "bfloat16", 1, 512, "lora_checkpointing"),
    ("opt-12", "float32", 2, 256, "meft"),
    ("opt-12", "float32", 2, 256, "bottleneck"),
    ("opt-12", "bfloat16", 2, 256, "full"),
    ("opt-12", "bfloat16", 2, 256, "meft1_paper"),
)


def config_of(name: str) -> Any:
    """Two shapes of our own, small enough for a CPU, and the packaged models."""
    if name == "llama-24":
        return LlamaConfig(
            vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=24, num_attention_heads=8,
            num_key_value_heads=4, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
    if name == "opt-12":
        return OPTConfig(
            vocab_size=8000, hidden_size=384, ffn_dim=1536, num_hidden_layers=12, num_attention_heads=6,
            word_embed_proj_dim=384, max_position_embeddings=1024, architectures=["OPTForCausalLM"],
        )  # fmt: skip
    return find_config(name)


def measured(config: Any, dtype: torch.dtype, rows: int, tokens: int, rival: str, meft: MeftConfig) -> dict[str, int]:
    """Kept bytes, and the peak of the whole second step, with weights, of a real model."""
    torch.manual_seed(0)
    base = build(config, dtype)
    model = RIVALS[rival].prepare(base, Budget.of(base, meft)).train()
    batch = text_batch(model, rows, tokens, CPU)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    weights = tensor_bytes([*model.parameters(), *model.buffers()])
    with LiveTensorMeter() as meter:
        for _ in range(2):
            before = meter.live_bytes
            meter.reset_peak()
            loss = model(**batch).loss
            kept = meter.live_bytes - before
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {"kept": kept, "total": weights + meter.peak_bytes}


def compare(name: str, dtype: str, rows: int, tokens: int, rival: str, meft: MeftConfig) -> dict[str, Any]:
    """One point, measured and estimated."""
    config = config_of(name)
    estimator = Estimator(config, getattr(torch, dtype), rows, meft, gpu=False)
    step: StepBytes = estimator.step(RIVALS[rival], tokens)
    real = measured(config, getattr(torch, dtype), rows, tokens, rival, estimator.meft)
    return {
        "model": name, "dtype": dtype, "rows": rows, "tokens": tokens, "rival": rival,
        "kept": {"measured": real["kept"], "estimated": step.kept},
        "total": {"measured": real["total"], "estimated": step.total},
    }  # fmt: skip


def error(point: dict[str, Any], what: str) -> float:
    """Percent by which the estimate is too large."""
    return float(100 * (point[what]["estimated"] / point[what]["measured"] - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted({point[0] for point in POINTS}))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    points = []
    print(f"{'model':<10}{'dtype':<10}{'batch':>9}  {'rival':<20}{'total, MiB':>11}{'estimate':>10}{'error':>9}")
    for name, dtype, rows, tokens, rival in POINTS:
        if name not in options.models:
            continue
        points.append(point := compare(name, dtype, rows, tokens, rival, MeftConfig()))
        total = {key: value / 2**20 for key, value in point["total"].items()}
        print(
            f"{name:<10}{dtype:<10}{f'{rows}x{tokens}':>9}  {rival:<20}{total['measured']:>11.1f}"
            f"{total['estimated']:>10.1f}{error(point, 'total'):>+8.2f}%  kept {error(point, 'kept'):+.2f}%",
            flush=True,
        )
    worst = max(abs(error(point, what)) for point in points for what in ("kept", "total"))
    print(f"worst error {worst:.2f} % over {len(points)} points")
    settings = {"models": options.models, "kernels": "as on a CPU"}
    Record.now("estimator", settings, {"points": points, "worst_percent": worst}, CPU).write(options.out / "cpu.json")


if __name__ == "__main__":
    main()
