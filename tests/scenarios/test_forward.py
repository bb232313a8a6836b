"""A base model whose own ``forward`` is bound, and what others do to a ``forward``: wrap it, copy it, take it apart."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import nn

import meft_kernels

from ..models import TRAINABLE_START, tiny_llama

IDS = torch.arange(1, 9)[None]


def base_model() -> Any:
    return tiny_llama(3).model


def patched(**settings: Any) -> Any:
    model = base_model()
    torch.manual_seed(5)
    return meft_kernels.patch(model, **{**TRAINABLE_START, **settings})


def last_hidden_state(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def test_its_arguments_can_be_read() -> None:
    """A Trainer drops columns that ``forward`` does not name."""
    assert inspect.signature(patched().forward) == inspect.signature(base_model().forward)


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_calls_its_own_layers(how: str) -> None:
    model = patched()
    expected = last_hidden_state(model)
    if how == "copied":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert torch.equal(last_hidden_state(copied), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.01)
    assert not torch.equal(last_hidden_state(copied), expected)
    assert torch.equal(last_hidden_state(model), expected)
    meft_kernels.unpatch(copied)
    assert torch.equal(last_hidden_state(model), expected)
    assert vars(copied).keys().isdisjoint({"forward", "_meft_forward"})


def test_accelerate_wraps_and_unwraps_it() -> None:
    """Mixed precision: accelerate takes methods apart, wraps their functions, and binds them again."""
    accelerate = pytest.importorskip("accelerate")
    model = patched()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # what a Trainer has left in this process
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    assert "input_ids" in inspect.signature(prepared.forward).parameters
    expected = last_hidden_state(prepared)
    copied = copy.deepcopy(prepared)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.01)
    assert not torch.equal(last_hidden_state(copied), expected)
    assert torch.equal(last_hidden_state(prepared), expected)

    meft_kernels.unpatch(prepared)  # inside of accelerate's wrapper, which stays
    last_hidden_state(prepared)
    meft_kernels.patch(prepared, rank=8, inference="exact")
    last_hidden_state(prepared)  # calibrates
    assert meft_kernels.describe(prepared).stacks[0].fraction_bits is not None

    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert "input_ids" in inspect.signature(unwrapped.forward).parameters
    last_hidden_state(unwrapped)
    meft_kernels.unpatch(unwrapped)
    assert vars(unwrapped).keys().isdisjoint({"forward", "_meft_forward"})
    assert torch.equal(last_hidden_state(unwrapped), last_hidden_state(base_model()))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    model = patched()
    expected = last_hidden_state(model)
    handle = model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.forward(IDS)
    handle.remove()
    assert torch.equal(last_hidden_state(model), expected)
    meft_kernels.add_adapter(model, "b")
    meft_kernels.set_adapter(model, "b")  # no pass counts as under way
