"""The cheapest proof: ops against the reference, whole patched models against plain autograd."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from benchmarks import kernel_cases
from benchmarks.kernel_cases import Case
from meft_kernels import MeftConfig, patch, verify

from .measure import attempt, release, seconds_left
from .models import batch_of, build
from .progress import Progress

DTYPES = ("float32", "bfloat16", "float16")
MODELS = ("bert-base", "llama-3.2-1b")
CASES = ((63, 100, 8), (256, 384, 64))
"""Rows, width, rank: a shape that no tile divides, and one of whole tiles."""
ITEMS = (
    *(f"op {op}" for op in ("couple", "uncouple")),
    *(f"{model} {dtype} meft2" for model in MODELS for dtype in DTYPES),
    *(f"op {op}" for op in kernel_cases.WITH_RANK),
    *(f"{model} bfloat16 {variant}" for model in MODELS for variant in ("meft1", "meft3")),
)
"""Whole models before the ops with most kernels to compile, of which a model's own kernels are a part."""


def run(progress: Progress, device: torch.device) -> None:
    """Each item until the time is over."""
    for name in progress.pending():
        if seconds_left() < 0:
            return
        outcome = attempt(progress, name, device, lambda name=name: _check(name, progress.piece.settings, device))  # type: ignore[misc]
        if outcome is not None:
            progress.put(name, outcome)
            print(f"  {name}: {'well' if outcome['ok'] else f'WRONG: {outcome}'}", flush=True)
        release(device)


def _check(name: str, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    if name.startswith("op "):
        return _op(name.removeprefix("op "), device)
    model, dtype, variant = name.split()
    return _model(model, dtype, variant, settings, device)


def _op(op: str, device: torch.device) -> dict[str, Any]:
    wrong = []
    for dtype, (rows, width, rank) in itertools.product(DTYPES, CASES):
        case = Case(op, rows, width, rank if op in kernel_cases.WITH_RANK else None, getattr(torch, dtype))
        if message := kernel_cases.mismatch(case, device):
            wrong.append(f"{case.label}: {message}")
    return {"ok": not wrong, "wrong": wrong}


def _model(model: str, dtype: str, variant: Any, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    base = build(model, device, getattr(torch, dtype), tiny=settings["tiny"])
    batch = batch_of(base, settings["rows"], settings["tokens"])
    # Adapters that already do something: from zero, half of the gradients would be zero too.
    config = MeftConfig(variant=variant, rank=settings["rank"], up_init_std=0.02)
    report = verify(patch(base, config), batch)
    # One rounding of every gradient to the model's dtype more or less, at some ten places; never below 1e-5, because
    # CUDA's attention adds up its gradients in no fixed order.
    bound = max(1e-5, 16 * torch.finfo(getattr(torch, dtype)).eps)
    found = {key: value for key, value in dataclasses.asdict(report).items() if key != "blocks_match"}
    ok = report.bit_exact and report.repeats and report.gradient_error <= bound
    if variant == "meft3":
        ok, found["blocks_match"] = ok and report.blocks_match, report.blocks_match
    return {"ok": ok, "gradient_bound": bound, **found}
