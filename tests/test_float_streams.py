"""The paper's arithmetic: right where its inverse can be, and said to be wrong where it cannot."""

from __future__ import annotations

import pytest
import torch

import meft_kernels

from .models import VARIANTS, pair, relative_error, tiny_batch, tiny_bert, tiny_llama, train_step


@pytest.mark.parametrize("coupling", ["centered", "paper"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float_arithmetic_at_shallow_depth(variant: str, coupling: str) -> None:
    model, oracle = pair("llama", variant=variant, coupling=coupling, arithmetic="float", lam=0.5, beta=0.5)
    batch = tiny_batch(model)
    loss, gradients = train_step(model, batch)
    expected_loss, expected = train_step(oracle, batch)
    assert loss == expected_loss  # the forward is the same
    # Three layers at 1/0.5 a lane: eps (1.2e-7) amplified by at most 2^6, then through the layers' own condition.
    assert relative_error(gradients, expected) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_float_arithmetic_at_its_own_defaults(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    """Shallow, the inverse holds; where it cannot, patch says so and how deep it would."""
    model, oracle = pair("llama", variant=variant, arithmetic="float", reversible_layers=2)
    batch = tiny_batch(model)
    assert relative_error(train_step(model, batch)[1], train_step(oracle, batch)[1]) < 1e-2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    meft_kernels.patch(tiny_llama(layers=12), variant=variant, arithmetic="float")
    assert "will be wrong. Use arithmetic='exact', or at most reversible_layers=" in caplog.text
    caplog.clear()
    meft_kernels.patch(tiny_llama(layers=12), variant=variant, arithmetic="float", engine="autograd")
    meft_kernels.patch(tiny_llama(layers=12), variant=variant)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_paper_presets_train(variant: str) -> None:
    config = meft_kernels.MeftConfig.paper(variant)
    assert (config.arithmetic, config.coupling, config.readout) == ("float", "paper", "mean")
    assert config.coefficients == {"meft1": (0.1, 1.0), "meft2": (1.0, 0.1), "meft3": (0.1, 0.1)}[variant]
    model = meft_kernels.patch(tiny_bert(), config)
    _, gradients = train_step(model.train(), tiny_batch(model))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
