"""What there is to run, the cheapest proof first, what can be done without last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import bandwidth, context, correctness, training
from .progress import Piece, Progress

RUN: dict[str, Callable[[Progress, torch.device], None]] = {
    "correctness": correctness.run,
    "kernels": bandwidth.run,
    "step": training.run,
    "context": context.run,
}

# Model, sequences, tokens, weight: about the seconds that it should take on an H100.
_STEPS = (
    ("bert-base", 32, 512, 40),
    ("llama-3.2-1b", 4, 2048, 60),
    ("llama-3.1-8b", 2, 2048, 80),
    ("roberta-large", 32, 512, 45),
    ("opt-1.3b", 4, 2048, 55),
)
_MORE_STEPS = (("bert-base", 32, 128, 30), ("llama-3.2-1b", 1, 8192, 45))
_CONTEXTS = (("llama-3.2-1b", 35), ("llama-3.1-8b", 45))


def pieces(rivals: tuple[str, ...], *, tiny: bool) -> list[Piece]:
    """All pieces, for these rivals. ``tiny`` keeps everything but the sizes."""
    common: dict[str, Any] = {"rank": 4 if tiny else 64, "tiny": tiny}
    first: dict[str, Any] = {**common, "rows": 2, "tokens": 16 if tiny else 128}
    made = [
        Piece("correctness", "correctness", first, correctness.ITEMS, 120),
        Piece("kernels", "kernels", {"tiny": tiny, "rounds": 2}, tuple(bandwidth.cases(tiny=tiny)), 50),
    ]

    def step(model: str, rows: int, tokens: int, weight: float) -> Piece:
        settings = {"model": model, "rows": rows, "tokens": tokens, "dtype": "bfloat16", "rounds": 7, "steps": 2}
        if tiny:
            settings.update(rows=2, tokens=max(4, tokens // 128), rounds=2, steps=1)
        items = (*training.REFERENCES, *(name for name in rivals if name not in training.REFERENCES))
        return Piece(f"step-{model}-{rows}x{tokens}", "step", {**common, **settings}, items, weight)

    def longest(model: str, weight: float) -> Piece:
        settings = {"model": model, "dtype": "bfloat16", "from": 4096, "to": 2**20, "loss_on": 256}
        if tiny:
            settings.update({"from": 16, "to": 64, "loss_on": 8})
        return Piece(f"context-{model}", "context", {**common, **settings}, context.RIVALS_HERE, weight)

    return [
        *made,
        *(step(*each) for each in _STEPS),
        *(longest(*each) for each in _CONTEXTS),
        *(step(*each) for each in _MORE_STEPS),
    ]
