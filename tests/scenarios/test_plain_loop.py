"""A training loop of one's own: accumulation, clipping, a schedule, autocast, evaluation in between, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels

from ..models import FAMILIES, TRAINABLE_START, relative_error, tiny_batch

STEPS, ACCUMULATED = 4, 2


class Loop:
    """What such a loop holds, and its steps."""

    def __init__(self, family: str, engine: str, autocast: bool = False) -> None:
        self.model = FAMILIES[family]()
        torch.manual_seed(5)
        meft_kernels.patch(self.model, engine=engine, fraction_bits=20, **TRAINABLE_START)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, STEPS)
        self.autocast = autocast
        self.losses: list[float] = []

    def loss(self, seed: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss: torch.Tensor = self.model(**tiny_batch(self.model, 3, 9, seed=seed)).loss
        return loss

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.model.train()
            torch.manual_seed(step)
            for part in range(ACCUMULATED):
                loss = self.loss(10 * step + part) / ACCUMULATED
                loss.backward()
                self.losses.append(float(loss.detach()))
            torch.nn.utils.clip_grad_norm_(self.trained, 0.5)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.model.eval()
            with torch.no_grad():
                self.losses.append(float(self.loss(99)))

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_under_autograd_and_resumed(family: str, autocast: bool, tmp_path: Path) -> None:
    whole, reference = Loop(family, "reversible", autocast), Loop(family, "autograd", autocast)
    for loop in (whole, reference):
        loop.run(0, STEPS)
    assert whole.losses[:ACCUMULATED] == reference.losses[:ACCUMULATED]  # before any update: the same forward
    precision = 2.0**-8 if autocast else 1e-4  # what the gradients of the second differ by, after Adam's division
    assert whole.losses == pytest.approx(reference.losses, abs=precision)
    assert relative_error(whole.weights(), reference.weights()) <= 10 * precision
    assert relative_error(whole.weights(), Loop(family, "reversible").weights()) > 0.05

    begun, resumed = Loop(family, "reversible", autocast), Loop(family, "reversible", autocast)
    begun.run(0, STEPS // 2)
    torch.save(begun.state(), tmp_path / "state.pt")
    for name, state in torch.load(tmp_path / "state.pt", weights_only=True).items():
        getattr(resumed, name).load_state_dict(state)
    resumed.run(STEPS // 2, STEPS)
    assert begun.losses + resumed.losses == whole.losses
    assert all(torch.equal(weight, whole.weights()[name]) for name, weight in resumed.weights().items())
