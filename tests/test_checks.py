"""``check``: when a layer that did not repeat is told of, and who has moved by then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import meft_kernels
from meft_kernels import MeftConfig, NotRepeatableError
from meft_kernels.patching.state import require_state

from .models import TRAINABLE_START, VARIANTS, tiny_batch, tiny_llama, train_step
from .test_detection import Forgetful

CHECKS = ("end", "layer")


def _made(check: str, variant: str = "meft2") -> nn.Module:
    model = tiny_llama()
    torch.manual_seed(5)
    return meft_kernels.patch(model, variant=variant, check=check, fraction_bits=16, **TRAINABLE_START).train()


def _stepping(model: nn.Module) -> list[str]:
    """Have every parameter moved by its gradient within backward; the names of those that were."""
    moved: list[str] = []

    def step(parameter: torch.Tensor, name: str) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad)
        parameter.grad = None
        moved.append(name)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: step(parameter, name))
    return moved


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_compute_the_same_and_count_alike(variant: str) -> None:
    found = []
    for check in CHECKS:
        model = _made(check, variant)
        found.append(train_step(model, tiny_batch(model)))
        assert require_state(model).stacks[0].counts.checked == 1
    assert found[0][0] == found[1][0]
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_moves_by_a_gradient_of_a_layer_that_did_not_repeat(variant: str) -> None:
    honest = _made("end", variant)
    _stepping(honest)
    honest(**tiny_batch(honest)).loss.backward()
    for check in CHECKS:
        model = _made(check, variant)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        # The first call gives what the layer itself would: the forward is the honest model's.
        layer = model.model.layers[1]
        layer.mlp.down_proj = Forgetful(layer.mlp.down_proj)
        layer.mlp.down_proj.calls = -1
        moved = _stepping(model)
        loss = model(**tiny_batch(model)).loss
        with pytest.raises(NotRepeatableError, match=r"model.layers.1 did not compute the same bits"):
            loss.backward()
        if check == "end":
            assert any(".layers.0." in name for name in moved)
            continue
        assert moved and all(".layers.2." in name for name in moved)
        after = {name.replace(".inner.", "."): parameter for name, parameter in model.named_parameters()}
        for name, parameter in honest.named_parameters():
            expected = parameter if name in moved else before[name]
            assert torch.equal(after[name], expected), name


def test_a_pass_that_was_stopped_cannot_be_taken_up_again() -> None:
    model = _made("layer")
    layer = model.model.layers[1]
    layer.mlp.down_proj = Forgetful(layer.mlp.down_proj)
    loss = model(**tiny_batch(model)).loss
    with pytest.raises(NotRepeatableError):
        loss.backward(retain_graph=True)
    with pytest.raises(meft_kernels.ReversibleUsageError, match="its streams are gone"):
        loss.backward()
    layer.mlp.down_proj = layer.mlp.down_proj.inner
    model.zero_grad()
    fresh = _made("layer")
    again, expected = (train_step(each, tiny_batch(each)) for each in (model, fresh))
    assert again[0] == expected[0]
    assert all(torch.equal(again[1][name], gradient) for name, gradient in expected[1].items())


def test_refused() -> None:
    with pytest.raises(ValueError, match="check must be one of end, layer"):
        MeftConfig(check="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belongs to arithmetic='exact'"):
        MeftConfig(check="layer", arithmetic="float")
