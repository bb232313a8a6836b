"""Time and memory of the loss of a language model from its last hidden states on, by how it is computed.

    python -m benchmarks.loss --rows 2048 --width 576 --vocabulary 49152

Forward and backward of a frozen head (SmolLM2's shape by default), every way in turn, so that a machine whose speed
drifts treats them alike: medians, and the medians of each one's ratio to whole logits *within* a round. Memory is the
peak in tensors beside hidden states and the head's weights, the gradient among it; what torch's own operator takes
inside is not seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from meft_kernels.comparison.records import Record
from meft_kernels.comparison.timing import interleaved
from meft_kernels.loss import bind_loss
from meft_kernels.loss.chunks import chunk_rows
from meft_kernels.memory import LiveTensorMeter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Head(nn.Module):
    """The end of a causal language model: head, cast, loss."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(weight, requires_grad=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(hidden).float(), labels)


def fused(weight: torch.Tensor, rows: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Torch's own (2.13 on). Its own choice of rows took 20 times as long on a CPU, so it is told."""
    wide: dict[str, Any] = {} if weight.dtype == torch.float32 else {"acc_dtype": torch.float32}
    options: Any = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, **wide)
    return lambda hidden, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


def ways(weight: torch.Tensor, chunks: list[int], count: int) -> dict[str, Callable[..., torch.Tensor]]:
    """Hidden states and labels to the loss, by name."""
    found: dict[str, Callable[..., torch.Tensor]] = {"full": Head(weight)}
    chosen = chunk_rows(count, weight.shape[1], weight.shape[0], weight.device, trained=False)
    for rows in sorted({*chunks, chosen}):
        head = Head(weight)
        bind_loss(head, rows=rows)
        found[f"chunks of {rows}" + (" (auto)" if rows == chosen else "")] = head
    if hasattr(F, "linear_cross_entropy"):
        found[f"F.linear_cross_entropy, {chunks[-1]} rows"] = fused(weight, chunks[-1])
    return found


def run(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds, their ratio to whole logits, MiB and errors against float64, by way."""
    torch.manual_seed(0)
    hidden = torch.randn(options.rows, options.width, device=device).to(dtype)
    weight = (0.05 * torch.randn(options.vocabulary, options.width, device=device)).to(dtype)
    labels = torch.randint(options.vocabulary, (options.rows,), device=device)
    made = ways(weight, options.chunks, options.rows)

    def stepper(way: Callable[..., torch.Tensor]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        def step() -> tuple[torch.Tensor, torch.Tensor]:
            leaf = hidden.detach().requires_grad_()
            loss = way(leaf, labels)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        return step

    steps = {name: stepper(way) for name, way in made.items()}
    times = interleaved(steps, rounds=options.rounds, device=device)
    truth = in_float64(hidden, weight, labels)
    figures = {}
    for name, step in steps.items():
        with LiveTensorMeter() as meter:
            loss, gradient = step()
            peak = meter.peak_bytes
        figures[name] = {
            "seconds": times.medians[name],
            "over_full": times.ratios("full")[name],
            "mib": peak / 2**20,
            "loss_error": abs(float(loss) / float(truth[0]) - 1),
            "gradient_error": float((gradient.double() - truth[1]).norm() / truth[1].norm()),
        }
    return figures


def in_float64(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, without ours."""
    leaf, wide = hidden.double().requires_grad_(), weight.double()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(hidden), 64):
        part = slice(start, start + 64)
        loss = F.cross_entropy(leaf[part] @ wide.T, labels[part], reduction="sum") / len(hidden)
        loss.backward()
        total += loss.detach()
    assert leaf.grad is not None
    return total, leaf.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=sorted(DTYPES))
    parser.add_argument("--out", type=Path, help="a folder for one JSON file a dtype")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in options.dtypes:
        figures = run(options, DTYPES[dtype], device)
        print(f"{options.rows:,} x {options.width} rows, {options.vocabulary:,} words, {dtype}, {device.type}")
        print(f"{'':36} {'s':>7} {'/ full':>7} {'MiB':>8} {'loss off':>9} {'gradient off':>13}")
        for name, row in figures.items():
            print(
                f"{name:36} {row['seconds']:7.3f} {row['over_full']:7.2f} {row['mib']:8.1f} {row['loss_error']:9.1e} "
                f"{row['gradient_error']:13.1e}"
            )
        if options.out:
            settings = {key: value for key, value in vars(options).items() if key not in ("out", "dtypes")}
            Record.now("loss", {**settings, "dtype": dtype}, figures, device).write(options.out / f"{dtype}.json")


if __name__ == "__main__":
    main()
