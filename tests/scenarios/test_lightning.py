"""Lightning's Trainer around a patched model. `pip install lightning`; without it these tests are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels

from ..models import TRAINABLE_START, relative_error, tiny_batch, tiny_llama

lightning = pytest.importorskip("lightning")

BATCHES, EPOCHS = 4, 2


def module(engine: str) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama()
            torch.manual_seed(5)
            meft_kernels.patch(self.model, engine=engine, fraction_bits=20, **TRAINABLE_START)
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            self.losses.append(float(loss.detach()))
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
            self.log("validation", self.model(**batch).loss)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    return Module()


def fit(made: Any, folder: Path, epochs: int, checkpoint: Path | None = None) -> Any:
    batches = [tiny_batch(made.model, 2, 9, seed=seed) for seed in range(BATCHES)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, monitor="validation", save_top_k=1, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=[saving],
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(made, loader, loader, ckpt_path=checkpoint)
    return saving


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}


def test_as_under_autograd_best_and_resumed(tmp_path: Path) -> None:
    whole, reference = module("reversible"), module("autograd")
    saved = fit(whole, tmp_path / "whole", EPOCHS)
    fit(reference, tmp_path / "reference", EPOCHS)
    assert len(whole.losses) == BATCHES * EPOCHS
    assert whole.losses == pytest.approx(reference.losses, abs=1e-4)
    assert relative_error(weights(whole), weights(reference)) <= 1e-3
    assert relative_error(weights(whole), weights(module("reversible"))) > 0.05

    best = module("reversible")
    best.load_state_dict(torch.load(saved.best_model_path, weights_only=False)["state_dict"])
    batch = tiny_batch(whole.model)
    with torch.no_grad():
        assert torch.equal(best.model.eval()(**batch).logits, whole.model.eval()(**batch).logits)  # the last is best

    begun, resumed = module("reversible"), module("reversible")
    half = fit(begun, tmp_path / "half", EPOCHS // 2)
    fit(resumed, tmp_path / "resumed", EPOCHS, Path(half.last_model_path))
    assert begun.losses + resumed.losses == whole.losses
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(resumed).items())
