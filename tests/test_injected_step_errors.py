"""An error anywhere in a training step: the model is then what it was, and the next step is that of one undisturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import meft_kernels

from .injection import Injected, call_sites, difference, everything, interrupted, same, spread
from .models import TRAINABLE_START, VARIANTS, tiny_batch, tiny_llama, train_step

AT_MOST = 9
"""Interruptions of forward and of backward: of all calls that stand in the code, so many, evenly spread."""
TILED = {"tile": 3}
WHOLE = {"tile": "off"}


def model_of(**settings: Any) -> Any:
    """With dropout inside the layers alone, so that a step draws from the global generator once, for their seed."""
    torch.manual_seed(5)
    model = tiny_llama(3, 16, attention_dropout=0.2)
    model = meft_kernels.patch(model, dropout=0.2, fraction_bits=18, **{**TRAINABLE_START, **settings}).train()
    train_step(
        model, tiny_batch(model)
    )  # what is done once for all (hooks that follow, blocks that are checked) is done
    return model


class Failing(torch.autograd.Function):
    """The identity, until it is told to fail."""

    calls = {"forward": 0, "backward": 0}
    at = {"forward": 0, "backward": 0}

    @classmethod
    def count(cls, way: str) -> None:
        cls.calls[way] += 1
        if cls.calls[way] == cls.at[way]:
            raise Injected(f"{way}, call {cls.calls[way]}")

    @classmethod
    def reset(cls, **at: int) -> None:
        cls.calls = {"forward": 0, "backward": 0}
        cls.at = {"forward": 0, "backward": 0, **at}

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        Failing.count("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        Failing.count("backward")
        return dy


def may_fail(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: Failing.apply(output))


def steps_the_same(model: Any, expected: Any, before: dict[str, Any], where: str | None) -> None:
    model.zero_grad()  # as after any error in a backward, a part of the gradients may have arrived
    now = everything(model)
    assert same(now, before), f"after an error in {where}: {difference(now, before)}"
    assert same(train_step(model, tiny_batch(model)), expected), where


@pytest.mark.parametrize("tiles", [TILED, WHOLE], ids=["tiles", "whole"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_error_inside_each_branch_of_each_layer(variant: str, tiles: dict[str, Any]) -> None:
    """In forward, in the recompute (which calls forward again), and in the recompute's own backward."""
    model = model_of(variant=variant, reversible_layers=2, **tiles)
    for layer in model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj, layer.meft["ffn"].up, layer.meft["stream"].up):
            may_fail(part)
    batch = tiny_batch(model)
    Failing.reset()
    expected = train_step(model, batch)
    made, drawn = dict(Failing.calls), torch.get_rng_state()
    assert made["forward"] > made["backward"] >= 10  # four parts of three layers, two of which are computed again
    before = everything(model)
    for way, count in made.items():
        for at in spread(range(1, count + 1), AT_MOST):
            Failing.reset(**{way: at})
            torch.manual_seed(2)
            with pytest.raises(Injected, match=f"{way}, call {at}"):
                model(**batch).loss.backward()
            assert torch.equal(torch.get_rng_state(), drawn), f"random numbers after an error in {way} {at}"
            Failing.reset()
            steps_the_same(model, expected, before, f"{way} {at}")


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("settings", [{**TILED, "variant": "meft2"}, {**WHOLE, "variant": "meft3"}], ids=str)
def test_an_error_in_the_engine_itself(settings: dict[str, Any], error: type[BaseException]) -> None:
    model = model_of(**settings)
    batch = tiny_batch(model)
    expected = train_step(model, batch)
    before = everything(model)

    def forward() -> torch.Tensor:
        torch.manual_seed(2)
        loss: torch.Tensor = model(**batch).loss
        return loss

    torch.manual_seed(2)
    begun = torch.get_rng_state()
    sites = call_sites(forward)
    drawn = torch.get_rng_state()
    for at in spread(sorted({last if error is KeyboardInterrupt else first for first, last in sites}), AT_MOST):
        where = interrupted(forward, at, error)
        state = torch.get_rng_state()
        assert torch.equal(state, begun) or torch.equal(state, drawn), f"random numbers after an error in {where}"
        steps_the_same(model, expected, before, where)
    sites = call_sites(forward().backward)
    for at in spread(sorted({last if error is KeyboardInterrupt else first for first, last in sites}), AT_MOST):
        model.zero_grad()
        loss = forward()
        where = interrupted(loss.backward, at, error)
        assert torch.equal(torch.get_rng_state(), drawn), f"random numbers after an error in {where}"
        del loss
        steps_the_same(model, expected, before, where)
