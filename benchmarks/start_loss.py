"""What patching alone does to a real model, before any training: by variant and coefficient, beside the paper's.

    python -m benchmarks.start_loss --model smollm2 --rows 8 --tokens 256 --draws 8
    python -m benchmarks.start_loss --all --draws 4 --markdown benchmarks/results/start_loss.md

For a causal model the change of its loss in nats; for an encoder the relative change of its last hidden states.
Draws are batches of other reviews: the mean over them, and the range, say more than any one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import meft_kernels
from benchmarks.real import real_batch, real_model
from meft_kernels import MeftConfig
from meft_kernels.patching.state import unwrap

COEFFICIENTS = (8, 16, 32, 64, 128, 256)
# What --all measures: small batches where the vocabulary is large.
MODELS: dict[str, dict[str, int]] = {
    "smollm2": {"rows": 8, "tokens": 256},
    "gemma3": {"rows": 2, "tokens": 256},
    "minilm": {"rows": 8, "tokens": 128},
}


def settings() -> dict[str, MeftConfig]:
    """The default first, then each variant with -1/q in its lanes that do not already have 1, then the paper."""
    found = {"default": MeftConfig()}
    for variant, lanes in (("meft1", ("lam",)), ("meft2", ("beta",)), ("meft3", ("lam", "beta"))):
        for q in COEFFICIENTS:
            chosen: dict[str, Any] = dict.fromkeys(lanes, -1 / q)
            found[f"{variant} -1/{q}"] = MeftConfig(variant=variant, **chosen)  # type: ignore[arg-type]
        found[f"{variant} paper"] = MeftConfig.paper(variant)  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class Row:
    """One setting's change on every draw."""

    name: str
    changes: list[float]
    kept: float
    """Bytes an element of the hidden states and layer."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.changes)


def causal_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).loss


def hidden_states(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return unwrap(model).base_model(**inputs).last_hidden_state[batch["attention_mask"].bool()]


def measure(name: str, rows: int, tokens: int, draws: int, chosen: list[str], report: Callable[[Row], None]) -> str:
    """Every chosen setting on every draw; tells what the changes are changes of."""
    model = real_model(name, torch.float32).eval()
    batches = [real_batch(name, rows, tokens, seed) for seed in range(draws)]
    causal = unwrap(model).get_output_embeddings() is not None
    look = causal_loss if causal else hidden_states
    with torch.no_grad():
        before = [look(model, batch) for batch in batches]
        for setting, config in settings().items():
            if setting not in chosen:
                continue
            torch.manual_seed(0)
            meft_kernels.patch(model, config)
            after = [look(model, batch) for batch in batches]
            kept = meft_kernels.describe(model).stacks[0].bits_per_element / 8
            meft_kernels.unpatch(model)
            pairs = list(zip(after, before, strict=True))
            if causal:
                changes = [float(new - old) for new, old in pairs]
            else:
                changes = [float((new - old).norm() / old.norm()) for new, old in pairs]
            report(Row(setting, changes, kept))
    if causal:
        return f"{float(before[0]):.4f} nats on the first draw when pretrained; change of the loss in nats"
    return "relative change of the last hidden states"


def as_markdown(name: str, size: dict[str, int], what: str, rows: list[Row]) -> str:
    lines = [
        f"## {name}, {size['rows']} reviews of {size['tokens']} tokens, {len(rows[0].changes)} draws",
        "",
        f"{what[0].upper()}{what[1:]}.",
        "",
        "| setting | bytes an element and layer | mean | from | to |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = min(row.changes), max(row.changes)
        lines.append(f"| {row.name} | {row.kept:.3f} | {row.mean:+.4f} | {low:+.4f} | {high:+.4f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    names = list(settings())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3, minilm, a hub id or a folder")
    parser.add_argument("--all", action="store_true", help=f"all of {', '.join(MODELS)}, at their own sizes")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--settings", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    options = parser.parse_args()
    models = MODELS if options.all else {options.model: {"rows": options.rows, "tokens": options.tokens}}
    tables = []
    for name, size in models.items():
        rows: list[Row] = []

        def report(row: Row, rows: list[Row] = rows) -> None:
            rows.append(row)
            low, high = min(row.changes), max(row.changes)
            print(
                f"{row.name:<14} kept {row.kept:.3f} B/elt   first draw {row.changes[0]:+.4f}   "
                f"mean {row.mean:+.4f} ({low:+.4f} to {high:+.4f})",
                flush=True,
            )

        print(f"{name}, {size['rows']} x {size['tokens']} tokens, {options.draws} draws")
        what = measure(name, size["rows"], size["tokens"], options.draws, options.settings, report)
        print(what)
        tables.append(as_markdown(name, size, what, rows))
    if options.markdown:
        head = f"# What patching alone does, before any training\n\nMade by `{' '.join(command(options))}`.\n\n"
        options.markdown.write_text(head + "\n".join(tables), encoding="utf-8")


def command(options: argparse.Namespace) -> list[str]:
    which = ["--all"] if options.all else ["--model", options.model, "--rows", str(options.rows)]
    return ["python", "-m", "benchmarks.start_loss", *which, "--draws", str(options.draws)]


if __name__ == "__main__":
    main()
