"""Models that read images or hear sounds beside their texts: trained on made-up ones, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels
from benchmarks.model_sweep.models import make

from ..models import StreamWitness


def labelled(model_type: str) -> tuple[Any, dict[str, Any]]:
    """A tiny random model, and two texts with an image or a sound each, which it is to learn by heart."""
    model, batch = make(model_type)
    batch = {name: value for name, value in batch.items() if name not in ("use_cache", "decoder_input_ids")}
    if "input_ids" in batch:
        ids = batch["input_ids"]
        words = (ids > 4) & (ids < 90)
        return model, {**batch, "labels": ids.masked_fill(~words, -100)}
    return model, {**batch, "labels": torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize(("model_type", "hears"), [("gemma3", "pixel_values"), ("whisper", "input_features")])
def test_training(model_type: str, hears: str, tmp_path: Path) -> None:
    model, batch = labelled(model_type)
    assert hears in batch
    torch.manual_seed(0)
    model = meft_kernels.patch(model, rank=8).train()
    witnesses = StreamWitness.on_every_stack(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert all(all(witness.equal.values()) and witness.equal for witness in witnesses)
    assert losses[-1] < 0.8 * losses[0]
    # The image, or the sound, is heard: another one gives another loss.
    with torch.no_grad():
        expected = model.eval()(**batch).loss
        assert model(**{**batch, hears: batch[hears].flip(0)}).loss != expected
        meft_kernels.save_adapter(model, tmp_path)
        again = meft_kernels.load_adapter(make(model_type)[0], tmp_path)
        assert again.eval()(**batch).loss == expected


def test_states_that_images_inject_between_layers() -> None:
    """Qwen3-VL adds what its vision tower saw to the hidden states between its first layers: they stay as they are."""
    model, batch = labelled("qwen3_vl")
    with pytest.raises(meft_kernels.UnsupportedModelError, match="states are injected between layers"):
        meft_kernels.patch(model)
    with pytest.raises(meft_kernels.UnsupportedModelError, match=r"change between .*layers\.0 and .*layers\.1"):
        meft_kernels.patch(model, probe=batch)
    meft_kernels.patch(model, probe=batch, frozen_layers=1).train()
    witness = StreamWitness(model)
    model(**batch).loss.backward()
    assert witness.equal == {1: True}
