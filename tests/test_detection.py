"""Numerical trouble is detected and raised: NaN, overflow, and layers that do not compute the same bits twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import meft_kernels
from meft_kernels import NonFiniteError, NotRepeatableError, StreamOverflowError
from meft_kernels.patching.state import require_state

from .models import TRAINABLE_START, tiny_batch, tiny_bert, tiny_llama, train_step, worst_error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{"fraction_bits": 16}, {"arithmetic": "float"}, {}])
def test_non_finite_names_the_layer(settings: dict[str, Any], value: float) -> None:
    model = meft_kernels.patch(tiny_llama(), **settings).train()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(NonFiniteError, match=r"G \(layer\) of model.layers.1"):
        model(**tiny_batch(model))
    embeds = torch.full((1, 2, 64), value)
    with pytest.raises(NonFiniteError, match="the hidden states that enter"):
        model(inputs_embeds=embeds)


def test_weights_that_an_earlier_step_spoilt_are_named() -> None:
    """As plain AdamW does to a head in float16, and the loss then to all adapters; no step wrote a frozen weight."""
    model = meft_kernels.patch(tiny_llama()).train()
    batch = tiny_batch(model)
    model(**batch)
    adapter = model.model.layers[0].meft["ffn"]
    with torch.no_grad():
        adapter.up.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"of model.layers.0.*earlier: layers.0.meft.ffn.up.weight holds NaN"):
        model(**batch)
    with torch.no_grad():
        adapter.up.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"G \(layer\) of model.layers.1") as raised:
        model(**batch)
    assert "began earlier" not in str(raised.value)


def test_overflow_names_the_layer_and_loses_nothing() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=28, **TRAINABLE_START).train()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StreamOverflowError, match=r"G \(layer\) of model.layers.1.*smaller fraction_bits than 28"):
        model(**tiny_batch(model))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_overflow_after_calibration_recalibrates() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    batch = tiny_batch(model)
    train_step(model, batch)
    stack = require_state(model).stacks[0]
    bits = stack.arithmetic.fraction_bits
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2e5)
    with pytest.raises(StreamOverflowError, match="calibrated anew"):
        model(**batch)
    train_step(model, batch)
    assert stack.arithmetic.fraction_bits < bits


class Forgetful(nn.Module):
    """Gives something else whenever it is called again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) * (1 + 1e-3 * self.calls)


def test_layer_that_does_not_repeat() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16, **TRAINABLE_START).train()
    model.model.layers[1].mlp.down_proj = Forgetful(model.model.layers[1].mlp.down_proj)
    loss = model(**tiny_batch(model)).loss
    with pytest.raises(
        NotRepeatableError, match=r"G \(layer\) of model.layers.1 did not compute the same bits.*causes"
    ):
        loss.backward()
    report = meft_kernels.verify(model, tiny_batch(model))
    assert not report.bit_exact
    assert report.first_mismatch == "model.layers.1"


def test_weights_changed_between_forward_and_backward() -> None:
    model = meft_kernels.patch(tiny_bert(), **TRAINABLE_START).train()
    loss = model(**tiny_batch(model)).loss
    model.bert.encoder.layer[2].meft["stream"].up.bias.data.add_(0.1)  # by .data, which no version counter sees
    with pytest.raises(NotRepeatableError, match=r"F \(adapter\) of bert.encoder.layer.2"):
        loss.backward()


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_dropout_live_in_a_part_of_the_model(arithmetic: str) -> None:
    """The first layer in eval mode, or only the dropout modules in train mode, must replay all the same."""
    for choose in ("first layer", "dropout alone"):
        results = []
        for engine in ("reversible", "autograd"):
            torch.manual_seed(5)
            model = meft_kernels.patch(tiny_bert(), arithmetic=arithmetic, engine=engine, beta=0.5, **TRAINABLE_START)
            if choose == "first layer":
                model.train()
                model.bert.encoder.layer[0].eval()
            else:
                for module in model.modules():
                    module.training = isinstance(module, nn.Dropout)
            results.append(train_step(model, tiny_batch(model)))
        assert results[0][0] == results[1][0]
        # Three layers at 1/0.5 amplify float's rounding (1.2e-7) to 1e-6; another mask gave 5e-2.
        assert worst_error(results[0][1], results[1][1]) < 1e-3


def test_partial_backward_is_checked() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    loss = model(**tiny_batch(model)).loss
    top = model.model.layers[2].meft["ffn"].up.weight
    model.model.layers[2].mlp.down_proj.weight.data.add_(0.01)
    with pytest.raises(NotRepeatableError, match=r"model.layers.2"):
        torch.autograd.grad(loss, [top])


def test_recalibration_goes_down_and_stays_down() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    batch = tiny_batch(model)
    train_step(model, batch)
    stack = require_state(model).stacks[0]
    large = {"inputs_embeds": torch.full((1, 3, 64), 2.0**12)}
    bits = []
    for _ in range(6):
        try:
            model(**large)
        except StreamOverflowError:
            train_step(model, batch)
        bits.append(stack.arithmetic.fraction_bits)
    assert bits[0] < 22
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] == bits[-2] <= 17  # 2^12 fits from k = 17 on
