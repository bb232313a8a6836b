"""Every rival that can run here trains: the start, how much is trained, what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS, Budget, UnavailableRivalError, rivals_named
from meft_kernels.comparison.rivals.ia3 import targets
from meft_kernels.patching.state import count_parameters

from .architectures.zoo import ZOO, batch_for, tiny

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CPU = torch.device("cpu")
HERE = [name for name, rival in RIVALS.items() if rival.why_unavailable(CPU) is None]
CONFIG = MeftConfig(rank=8, dropout=0.0)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_trains_as_much_as_ours_and_starts_from_the_model(family: str, name: str) -> None:
    model = tiny(family).eval()
    batch = batch_for(model)
    budget = Budget.of(model, CONFIG)
    before = model(**batch).loss.item()
    made = RIVALS[name].prepare(copy.deepcopy(model), budget).eval()
    loss = made(**batch).loss
    if not name.endswith("paper"):  # whose coupling moves the start, and whose adapters begin with noise
        assert loss.item() == pytest.approx(before, abs=2e-2)
    loss.backward()
    trained = {key: p for key, p in made.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for p in made.parameters() if not p.requires_grad)
    if name not in ("full", "ia3"):  # one has no choice, the other takes all
        one_rank = count_parameters(made)[0] / budget.config.rank
        assert abs(count_parameters(made)[0] - budget.trainable) <= one_rank


@pytest.mark.parametrize("family", sorted(ZOO))
def test_budgets_and_places_are_found_in_every_family(family: str) -> None:
    model: Any = tiny(family)
    budget = Budget.of(model, CONFIG)
    patched = meft_kernels.patch(copy.deepcopy(model), CONFIG)
    assert budget.trainable == count_parameters(patched)[0]
    if "mixtral" in family or family == "qwen3_moe":
        with pytest.raises(UnavailableRivalError, match="no keys, values or feed-forward"):
            targets(model, budget)  # their experts are one tensor
    else:
        everywhere, feedforward = targets(model, budget)
        assert set(feedforward) < set(everywhere)
    lora = RIVALS["lora"].prepare(copy.deepcopy(model), budget)
    assert abs(count_parameters(lora)[0] - budget.trainable) <= count_parameters(lora)[0] / 2
    made = RIVALS["bottleneck"].prepare(model, budget).train()
    assert sum(".bottleneck." in key for key, p in made.named_parameters() if p.requires_grad) >= 8


def test_names_and_what_is_missing() -> None:
    assert [rival.name for rival in rivals_named(["lora", "meft"])] == ["lora", "meft"]
    with pytest.raises(ValueError, match="lroa is none of the rivals meft, "):
        rivals_named(["lroa"])
    assert "CUDA" in (RIVALS["lora_offload"].why_unavailable(CPU) or "")
    assert "not installed" in (RIVALS["unsloth"].why_unavailable(torch.device("cuda")) or "")
