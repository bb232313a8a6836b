"""Estimates, plans and budgets of models without a family file: their structure is found on a small copy with data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import meft_kernels
from meft_kernels import MeftConfig, UnsupportedModelError
from meft_kernels.architectures.found import find_on_a_copy
from meft_kernels.comparison.rivals import rivals_named
from meft_kernels.estimate.estimator import Estimator
from meft_kernels.estimate.step import measure_step, text_batch
from meft_kernels.estimate.twin import bare_twin, build, simulation
from meft_kernels.patching import targets

from .zoo import tiny_config

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SETTINGS = MeftConfig(tile=16, fraction_bits=16)


def granite(**overrides: Any) -> Any:
    settings = {**SIZES, "num_key_value_heads": 2, "architectures": ["GraniteForCausalLM"], **overrides}
    return transformers.GraniteConfig(**settings)


@pytest.mark.parametrize("rival", ["meft", "meft3"])
def test_an_estimate_is_what_a_real_step_takes(rival: str) -> None:
    (named,) = rivals_named([rival])
    config = granite()
    estimated = Estimator(config, torch.float32, 2, SETTINGS, gpu=False).step(named, 24)
    torch.manual_seed(0)
    model = build(config, torch.float32)
    budget = Estimator(config, torch.float32, 2, SETTINGS, gpu=False)._budget(config, named, (4,))
    model = named.prepare(model, budget).train()
    measured = measure_step(model, text_batch(model, 2, 24, torch.device("cpu")))
    assert measured.weights == estimated.weights
    assert abs(measured.total - estimated.total) <= 0.01 * measured.total


@pytest.mark.parametrize("rival", ["meft", "meft3"])
def test_found_and_written_take_the_same(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: what a block leaves out takes no memory."""
    (named,) = rivals_named([rival])
    config = tiny_config("opt", num_hidden_layers=2, architectures=["OPTForCausalLM"])
    written = Estimator(config, torch.bfloat16, 2, SETTINGS).step(named, 40)
    monkeypatch.setattr(targets, "find_architecture", lambda model_type: None)
    assert Estimator(config, torch.bfloat16, 2, SETTINGS).step(named, 40) == written


def test_a_budget() -> None:
    model = transformers.GraniteForCausalLM(granite())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = meft_kernels.plan(model, memory="4GiB", batch=(2, 24))
    assert plan.settings == {"reversible_layers": 0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    meft_kernels.patch(model, memory="4GiB", batch=(2, 24))
    assert "0 of 4 layers reversible" in meft_kernels.describe(model).plan.chosen.what


def test_a_large_model_is_looked_at_as_a_small_one() -> None:
    """Narrow, of few words, of few layers: the random numbers drawn for it are nobody else's."""
    config = granite(
        vocab_size=50000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=40, num_attention_heads=32
    )
    numbers = torch.get_rng_state()
    with simulation(gpu=False):
        found = find_on_a_copy(bare_twin(config, torch.bfloat16))
        assert find_on_a_copy(bare_twin(copy.deepcopy(config), torch.bfloat16)) is found
    assert torch.equal(torch.get_rng_state(), numbers)
    assert "model.layers, 4 GraniteDecoderLayer" in found.line
    assert "in two blocks" in found.line


def test_of_what_no_copy_can_be_made() -> None:
    class Stubborn(transformers.GraniteForCausalLM):
        def __init__(self, config: Any) -> None:
            if config.vocab_size < 50000:
                raise ValueError("too few words")
            super().__init__(config)

    with simulation(gpu=False):
        model = bare_twin(granite(vocab_size=50000), torch.float32, None, Stubborn)
        assert isinstance(model, nn.Module)
        with pytest.raises(UnsupportedModelError, match=r"no small copy of it can be made .*too few words"):
            meft_kernels.patch(model)
