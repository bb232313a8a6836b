"""Bandwidth of the fused ops, by ``benchmarks.kernels``."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks import kernel_cases, kernels
from benchmarks.kernel_cases import Case

from .measure import attempt, release, seconds_left
from .progress import Progress

DTYPE = torch.bfloat16


def cases(*, tiny: bool) -> dict[str, Case]:
    """By label; every op at the widths of BERT-large and Llama-8B."""
    shapes = [(16, 32)] if tiny else [(16384, 1024), (16384, 4096)]
    rank = 8 if tiny else 64
    found = [
        Case(op, rows, width, rank if op in kernel_cases.WITH_RANK else None, DTYPE)
        for rows, width in shapes
        for op in kernel_cases.OPS
    ]
    return {case.label: case for case in found}


def run(progress: Progress, device: torch.device) -> None:
    """Each case until the time is over."""
    known, took = cases(tiny=progress.piece.settings["tiny"]), 0.0
    if device.type == "cuda":
        progress.notes["copy_bandwidth"] = kernels.copy_bandwidth(device)
    for name in progress.pending():
        if seconds_left() < 1.5 * took:
            return
        began = time.perf_counter()
        outcome = attempt(progress, name, device, lambda case=known[name]: _measure(case, device, progress))  # type: ignore[misc]
        took = max(took, time.perf_counter() - began)
        if outcome is not None:
            progress.put(name, outcome)
        torch.compiler.reset()  # cases share code, and after eight of them torch.compile would fall back to eager
        release(device)


def _measure(case: Case, device: torch.device, progress: Progress) -> dict[str, Any]:
    if wrong := kernel_cases.mismatch(case, device):
        raise ValueError(f"no speed, the op is wrong: {wrong}")
    if device.type == "cuda":
        return kernels.measure(case, device, progress.piece.settings["rounds"], progress.notes["copy_bandwidth"])
    for call in kernel_cases.rivals(case, device, compiled=False).values():
        call()
    return {"dry_run": True, "least_bytes": kernel_cases.least_bytes(case)}
