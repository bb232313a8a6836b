"""Gradients of the streams are accumulated into: run by tests/test_stream_gradients.py in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meft_kernels.engine.step import Step
from meft_kernels.memory import LiveTensorMeter
from tests.models import tiny_batch, train_step
from tests.test_stream_gradients import inplace_and_copied


def test_all_gradients_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise nothing is saved: both of every layer's come from the layer above, or from the read-out."""
    model = inplace_and_copied("meft2")[0]
    owned: list[tuple[bool, bool]] = []
    backward = Step.backward

    def spy(self: Step, *args: Any, **kwargs: Any) -> Any:
        owned.append(kwargs["owned"])
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(Step, "backward", spy)
    train_step(model, tiny_batch(model))
    assert owned == [(True, True)] * 4


def test_it_saves_what_it_is_for() -> None:
    """The copy of one stream's gradient, in the layer that holds most."""
    batch = {"input_ids": torch.randint(1, 90, (1, 512), generator=torch.Generator().manual_seed(0))}
    batch["labels"] = batch["input_ids"]
    peaks = []
    for model in inplace_and_copied("meft2", tile=32, loss="full"):
        model(**batch).loss.backward()
        model.zero_grad()
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
        with LiveTensorMeter() as meter:
            hidden.backward(torch.ones_like(hidden))
        peaks.append(meter.peak_bytes)
    assert peaks[1] - peaks[0] >= 0.9 * 512 * 64 * 4
