"""What others have published of the longest texts that they train, for the table to be read beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .shapes import find_config

NEAR = 0.1
"""Cards sold under one number differ by this much: an H100 of 80GB has 79.1 GiB, 84.9 x 10^9 bytes."""


@dataclass(frozen=True)
class Published:
    """One figure.

    Attributes:
        gigabytes: of the one GPU, in the number that it is sold under.
        what: by which method, on which card.
        source: where it stands.
    """

    gigabytes: int
    tokens: int
    who: str
    what: str
    source: str

    def __str__(self) -> str:
        return f"{self.who}: {self.tokens:,} tokens ({self.what}; {self.source})"


_UNSLOTH = (
    "Unsloth",
    "QLoRA in 4 bits, rank 32, all linear layers, batch 1, checkpoints on the host, cut cross entropy",
    "https://unsloth.ai/docs/basics/unsloth-benchmarks",
)

LLAMA_8B = (
    Published(24, 78_475, *_UNSLOTH),
    Published(80, 342_733, *_UNSLOTH),
    Published(
        80, 142_400, "StreamBP", "Qwen3-8B, LoRA, 16-bit weights, A800", "https://github.com/Ledzy/StreamBP, table 3"
    ),
    Published(
        80,
        500_000,
        "Arctic long sequence training",
        "full fine-tuning, states on the host, H100",
        "https://arxiv.org/abs/2506.13996",
    ),
)


def published(config: Any, capacity: int) -> list[Published]:
    """Those for this model's shape on a GPU of this size."""
    llama = find_config("llama-3.1-8b")
    same = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    if any(getattr(config, name, None) != getattr(llama, name) for name in same):
        return []
    return [each for each in LLAMA_8B if abs(capacity / (each.gigabytes * 10**9) - 1) <= NEAR]
