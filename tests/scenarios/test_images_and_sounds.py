"""Models that read images or hear sounds beside their texts: trained on made-up ones, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import meft_kernels
from benchmarks.model_sweep.models import make
from meft_kernels.patching.state import require_state

from ..models import StreamWitness, worst_error

LANGUAGE, VISION = "model.language_model.layers", "model.visual.blocks"


def labelled(model_type: str) -> tuple[Any, dict[str, Any]]:
    """A tiny random model, and two texts with an image or a sound each, which it is to learn by heart."""
    model, batch = make(model_type)
    batch = {name: value for name, value in batch.items() if name not in ("use_cache", "decoder_input_ids")}
    if "input_ids" in batch:
        ids = batch["input_ids"]
        words = (ids > 4) & (ids < 90)
        return model, {**batch, "labels": ids.masked_fill(~words, -100)}
    return model, {**batch, "labels": torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(1))}


def trained(model: Any, batch: dict[str, Any], folder: Path, steps: int) -> list[float]:
    """The losses of a Trainer that sees this batch again and again."""
    settings = {
        "max_steps": steps,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
    }
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    trainer = Trainer(model, arguments, train_dataset=[{}] * 8, data_collator=lambda _: dict(batch))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("model_type", "hears", "stacks"),
    [
        ("gemma3", "pixel_values", None),
        ("whisper", "input_features", None),
        ("qwen3_vl", "pixel_values", (LANGUAGE, VISION)),
    ],
)
def test_training(model_type: str, hears: str, stacks: tuple[str, ...] | None, tmp_path: Path) -> None:
    model, batch = labelled(model_type)
    assert hears in batch
    torch.manual_seed(0)
    model = meft_kernels.patch(model, rank=8, stacks=stacks, probe=batch if stacks else None)
    witnesses = StreamWitness.on_every_stack(model)
    losses = trained(model, batch, tmp_path / "run", 12)
    assert all(witness.equal and all(witness.equal.values()) for witness in witnesses)
    assert losses[-1] < 0.8 * losses[0]
    StreamWitness.off(model)
    # The image, or the sound, is heard: another one gives another loss.
    with torch.no_grad():
        expected = model.eval()(**batch).loss
        assert model(**{**batch, hears: batch[hears].flip(0)}).loss != expected
        meft_kernels.save_adapter(model, tmp_path)
        base = make(model_type)[0]
        if stacks is None:
            again = meft_kernels.load_adapter(base, tmp_path)
        else:  # by the adapter's folder alone, without a batch that has images
            base.save_pretrained(tmp_path / "base")
            again = meft_kernels.AutoMeftModel.from_pretrained(tmp_path, base_model=tmp_path / "base")
        assert again.eval()(**batch).loss == expected


def test_states_that_images_inject_between_layers() -> None:
    """Qwen3-VL adds what its vision tower saw to the hidden states above its first layers: a stack for each run."""
    model, batch = labelled("qwen3_vl")
    with pytest.raises(meft_kernels.UnsupportedModelError, match=r"with images, states are injected between layers"):
        meft_kernels.patch(model)
    texts = {name: batch[name] for name in ("attention_mask", "labels")}
    texts["input_ids"] = batch["input_ids"].clamp(max=89)
    for each in (batch, texts):
        results = []
        for engine in ("reversible", "autograd"):
            model, _ = labelled("qwen3_vl")
            with torch.no_grad():
                expected = model(**each).loss
            torch.manual_seed(5)
            meft_kernels.patch(model, probe=batch, engine=engine, rank=8, up_init_std=0.05)
            stacks = require_state(model).stacks
            assert [stack.calls for stack in stacks] == [(0,), (1,), (2, 3)]
            with torch.no_grad(), meft_kernels.disable_adapter(model):
                assert model(**each).loss == expected
            witnesses = StreamWitness.on_every_stack(model)
            loss = model.train()(**each).loss
            loss.backward()
            results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            if engine == "reversible":
                assert [list(w.equal.values()) for w in witnesses] == [[True], [True], [True, True]]
        assert results[0][0] == results[1][0]
        assert worst_error(results[0][1], results[1][1], floor=1e-3) <= 1e-5
        names = {name.split(".meft.")[0] for name in results[0][1]}
        assert names == {f"{LANGUAGE}.{index}" for index in range(4)}
