"""The memory estimator against measurement: training steps of whole models with real tensors, on the CPU.

    python -m benchmarks.estimator
    python -m benchmarks.estimator --gpu    # against the bytes that benchmarks.gpu has recorded on GPUs; needs none

Each point is one step of AdamW after another, so that the second has the state of the first, under LiveTensorMeter. The
estimate is what ``meft-kernels estimate`` computes, from fewer layers and without data, with the allocations of a CPU.
Weights are random where a real model's shapes are known: memory does not depend on them.

On a GPU the measured bytes are those of torch's allocator, which rounds up and counts what kernels take for themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig

from benchmarks.gpu.models import config_of as gpu_config
from benchmarks.gpu.models import trained
from meft_kernels import MeftConfig
from meft_kernels.comparison.records import Record
from meft_kernels.comparison.rivals import RIVALS, Budget, Rival
from meft_kernels.estimate.estimator import Estimator, why_not_estimated
from meft_kernels.estimate.shapes import find_config
from meft_kernels.estimate.step import StepBytes, tensor_bytes, text_batch
from meft_kernels.estimate.twin import build
from meft_kernels.memory import LiveTensorMeter

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results" / "estimator"
GPU_RESULTS = Path(__file__).parent / "results" / "gpu"

# model, dtype, rows, tokens, rival
POINTS = (
    ("minilm", "float32", 8, 128, "full"),
    ("minilm", "float32", 8, 128, "lora"),
    ("minilm", "float32", 8, 256, "meft"),
    ("minilm", "bfloat16", 4, 512, "meft1"),
    ("smollm2", "float32", 1, 256, "meft"),
    ("smollm2", "float32", 1, 256, "lora_checkpointing"),
    ("smollm2", "float32", 1, 512, "lora_chunked"),
    ("smollm2", "bfloat16", 2, 512, "lora_chunked_host"),
    ("smollm2", "float32", 2, 1024, "lora_chunked_tiled"),
    ("smollm2", "bfloat16", 2, 1024, "lora_chunked_tiled_host"),
    ("smollm2", "float32", 1, 512, "meft_pieces_host"),
    ("smollm2", "bfloat16", 1, 512, "meft_pieces"),
    ("minilm", "float32", 4, 512, "meft_pieces_host"),
    ("llama-24", "float32", 1, 1024, "meft_host"),
    ("opt-12", "float32", 2, 512, "meft_pieces"),
    ("smollm2", "bfloat16", 1, 256, "lora"),
    ("smollm2", "bfloat16", 2, 128, "meft_lora"),
    ("llama-24", "float32", 1, 256, "full"),
    ("llama-24", "float32", 1, 512, "meft"),
    ("llama-24", "bfloat16", 1, 512, "meft3"),
    ("llama-24", "bfloat16", 1, 512, "lora_checkpointing"),
    ("llama-24", "float32", 2, 1024, "lora_chunked_tiled_host"),
    ("opt-12", "float32", 2, 256, "meft"),
    ("opt-12", "float32", 2, 256, "bottleneck"),
    ("opt-12", "bfloat16", 2, 256, "full"),
    ("opt-12", "bfloat16", 2, 256, "meft1_paper"),
    ("opt-12", "float32", 2, 256, "lora_chunked_host"),
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
    """Kept bytes, and the peaks of the whole second step, with weights and in host memory, of a real model."""
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
    return {"kept": kept, "total": weights + meter.peak_bytes, "host": meter.host_peak_bytes}


def compare(name: str, dtype: str, rows: int, tokens: int, rival: str, meft: MeftConfig) -> dict[str, Any]:
    """One point, measured and estimated."""
    config = config_of(name)
    estimator = Estimator(config, getattr(torch, dtype), rows, meft, gpu=False)
    step: StepBytes = estimator.step(RIVALS[rival], tokens)
    real = measured(config, getattr(torch, dtype), rows, tokens, rival, estimator.meft)
    return _point(name, dtype, rows, tokens, rival, real, step)


def _point(
    model: str, dtype: str, rows: int, tokens: int, rival: str, real: dict[str, int], step: StepBytes
) -> dict[str, Any]:
    return {
        "model": model, "dtype": dtype, "rows": rows, "tokens": tokens, "rival": rival,
        "kept": {"measured": real["kept"], "estimated": step.kept},
        "total": {"measured": real["total"], "estimated": step.total},
        "host": {"measured": real.get("host", 0), "estimated": step.host},
    }  # fmt: skip


def compare_with_gpu(record: Record) -> Iterator[dict[str, Any]]:
    """Every rival that ``benchmarks.gpu`` has measured on one model and batch, and its estimate."""
    settings = record.settings
    meft = MeftConfig(rank=settings["rank"], adapter_dtype="model")
    dtype, rows, tokens = getattr(torch, settings["dtype"]), settings["rows"], settings["tokens"]
    estimator = Estimator(gpu_config(settings["model"], tiny=settings["tiny"]), dtype, rows, meft)
    for rival, found in record.figures["items"].items():
        if "peak_bytes" not in found or why_not_estimated(RIVALS[rival]):
            continue
        step = estimator.step(_in_one_dtype(RIVALS[rival], dtype), tokens)
        real = {"kept": found["kept_bytes"], "total": found["weights_bytes"] + found["peak_bytes"]}
        yield _point(settings["model"], settings["dtype"], rows, tokens, rival, real, step)


def _in_one_dtype(rival: Rival, dtype: torch.dtype) -> Rival:
    """As ``benchmarks.gpu`` runs it: what it trains is in the base's dtype, where PEFT would take float32."""

    def prepare(base: nn.Module, budget: Budget) -> nn.Module:
        model = rival.prepare(base, budget)
        for parameter in trained(model):
            parameter.data = parameter.detach().to(dtype)
        return model

    return dataclasses.replace(rival, prepare=prepare)


def error(point: dict[str, Any], what: str) -> float:
    """Percent by which the estimate is too large."""
    estimated, measured = point[what]["estimated"], point[what]["measured"]
    return float(100 * (estimated / measured - 1)) if measured else 0.0 if not estimated else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted({point[0] for point in POINTS}))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--gpu", action="store_true", help="against what benchmarks.gpu has recorded, per device")
    options = parser.parse_args()
    if options.gpu:
        steps = sorted(GPU_RESULTS.glob("*/step-*.json"))
        if not steps:
            parser.error("there are no steps in benchmarks/results/gpu: run python -m benchmarks.gpu on a GPU first")
        for folder in dict.fromkeys(path.parent for path in steps):
            records = [Record.read(path) for path in steps if path.parent == folder]
            points = (point for record in records for point in compare_with_gpu(record))
            settings = {"measured by": "benchmarks.gpu", "device": records[0].environment["device"]}
            report(points, settings, options.out / f"{folder.name}.json")
        return
    points = (compare(*point, MeftConfig()) for point in POINTS if point[0] in options.models)
    report(points, {"models": options.models, "kernels": "as on a CPU"}, options.out / "cpu.json")


def report(points: Iterable[dict[str, Any]], settings: dict[str, Any], path: Path) -> None:
    """Print every point as it comes, and write them down."""
    done = []
    print(f"{'model':<14}{'dtype':<10}{'batch':>9}  {'rival':<24}{'total, MiB':>11}{'estimate':>10}{'error':>9}")
    for point in points:
        done.append(point)
        total = {key: value / 2**20 for key, value in point["total"].items()}
        batch = f"{point['rows']}x{point['tokens']}"
        print(
            f"{point['model']:<14}{point['dtype']:<10}{batch:>9}  {point['rival']:<24}{total['measured']:>11.1f}"
            f"{total['estimated']:>10.1f}{error(point, 'total'):>+8.2f}%  kept {error(point, 'kept'):+.2f}%",
            flush=True,
        )
    worst = max(abs(error(point, what)) for point in done for what in ("kept", "total", "host"))
    print(f"worst error {worst:.2f} % over {len(done)} points")
    Record.now("estimator", settings, {"points": done, "worst_percent": worst}, CPU).write(path)


if __name__ == "__main__":
    main()
