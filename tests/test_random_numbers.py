"""Which random numbers the parts of a pass draw: each its own, and in the recompute those of forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels.engine import call, pieces

from .models import TRAINABLE_START, VARIANTS, tiny_batch, tiny_llama


@pytest.mark.parametrize(
    "settings", [{}, {"tile": 3}, {"tile": 3, "attention": "pieces"}], ids=["whole", "tiles", "all"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_draws_its_own(variant: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal seeds would drop the same elements in every layer, lane or tile."""
    seeds: list[int] = []
    plain = call.seeded

    @contextlib.contextmanager
    def recording(seed: int, device: torch.device) -> Iterator[None]:
        seeds.append(seed)
        with plain(seed, device):
            yield

    model = meft_kernels.patch(tiny_llama(), variant=variant, **TRAINABLE_START, **settings).train()
    batch = tiny_batch(model)
    with torch.no_grad():
        model(**batch)  # calibrates
    for module in (call, pieces):
        monkeypatch.setattr(module, "seeded", recording)
    loss = model(**batch).loss
    forward = list(seeds)
    assert len(set(forward)) == len(forward)
    assert len(forward) >= 3 * 2 * (2 if settings else 1)
    seeds.clear()
    loss.backward()
    assert set(seeds) == set(forward)
    seeds.clear()
    model(**batch)
    assert not set(seeds) & set(forward)
