"""Traps in models' own code, where both engines could agree about a wrong function; and wrappers around models."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import meft_kernels
from meft_kernels import UnsupportedModelError
from meft_kernels.architectures.found import find

from ..models import worst_error
from .exactness import FP32_BOUND, everything_of, patched, step
from .test_found_refusals import Layer, MadeUp, MadeUpConfig, Run, backwards, in_turn, made_up


class Crosses(Layer):
    """Mixes what it is given as keys, which are the hidden states once more."""

    def forward(self, x: torch.Tensor, keys: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.mix(self.norm1(keys)).cumsum(1)
        return x + self.fall(torch.tanh(self.rise(self.norm2(x))))


class Beside(Layer):
    """Moves another state, too, by linear layers that come last."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, other: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x), other + self.down(torch.tanh(self.up(other)))


def crosses(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    for layer in model.stack:
        x = layer(x, x)
    return x


def beside(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    other = x.tanh()
    for layer in model.stack:
        x, other = layer(x, other)
    return x + other


def reads(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    middle = model.stack[0](x)
    x = model.stack[2](model.stack[1](middle))
    return x + middle.tanh()


@pytest.mark.parametrize(("layer", "run"), [(Layer, reads), (Crosses, crosses)], ids=["by the model", "by a layer"])
def test_hidden_states_read_between_layers(layer: type[Layer], run: Run) -> None:
    """Who uses what a layer in the middle gave has it, with its gradient: the model, or the next layer once more."""
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(made_up(layer, run), engine=engine).train()
        results.append(step(model, {"input_ids": ids}))
    assert results[0][0] == results[1][0]
    assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND
    with torch.no_grad():
        expected = made_up(layer, run)(ids).last_hidden_state
        found = meft_kernels.patch(made_up(layer, run))(ids).last_hidden_state
    # Not to be seen in a step: both engines would hand on the same wrong numbers.
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_masks_that_numpy_draws_are_those_of_the_seed() -> None:
    """As SpecAugment's: the pass that calibrates takes none of NumPy's random numbers, nor of Python's."""

    def masked(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
        drawn.append((np.random.rand(), random.random()))
        return in_turn(model, x)

    drawn: list[tuple[float, float]] = []
    model = meft_kernels.patch(made_up(run=masked))
    del drawn[:]
    np.random.seed(3)
    random.seed(3)
    model(torch.tensor([[3, 4, 5, 6]]))
    np.random.seed(3)
    random.seed(3)
    assert drawn == [(np.random.rand(), random.random())] * 2


class Writes(MadeUp):
    """Writes into what it is given, as a decoder that adds positions to its encoder's states."""

    def forward(self, inputs_embeds: torch.Tensor) -> Any:  # type: ignore[override]
        inputs_embeds += 1
        return BaseModelOutput(last_hidden_state=self.out(self.run(self, inputs_embeds)))


def test_a_model_that_writes_into_its_arguments() -> None:
    """Calibration, which calls it once more, hands it others."""
    model = meft_kernels.patch(
        Writes(MadeUpConfig(vocab_size=30, hidden_size=16)), probe={"inputs_embeds": torch.zeros(1, 4, 16)}
    )
    given = torch.zeros(1, 4, 16)
    with torch.no_grad():
        first = model(inputs_embeds=given).last_hidden_state
        assert torch.equal(given, torch.ones(1, 4, 16))
        assert torch.equal(model(inputs_embeds=torch.zeros(1, 4, 16)).last_hidden_state, first)


class Square(Layer):
    """Its FFN is as wide as its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(16, 16), nn.Linear(16, 16)


@pytest.mark.parametrize(("layer", "run"), [(Beside, beside), (Square, in_turn)])
def test_the_ffn_is_one_that_writes_hidden_states(layer: type[Layer], run: Run) -> None:
    model = made_up(layer, run)
    (layers,) = find(model).layers
    assert layers.ffn_reads(model.stack[0]) is model.stack[0].rise
    assert layers.ffn_writes(model.stack[0]) is model.stack[0].fall


def _under_peft(model: MadeUp) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["mix"]))


def _under_ddp(model: MadeUp) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


@pytest.mark.parametrize("around", [_under_peft, _under_ddp, torch.compile])
def test_what_does_not_serve_is_refused_in_a_wrapper(around: Callable[[MadeUp], Any]) -> None:
    if around is _under_ddp:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = around(made_up(run=backwards))
        before = everything_of(model)
        with pytest.raises(UnsupportedModelError, match=r"'made_up' .* layers run in another order than they stand"):
            meft_kernels.patch(model)
        assert everything_of(model) == before
    finally:
        if around is _under_ddp:
            dist.destroy_process_group()
