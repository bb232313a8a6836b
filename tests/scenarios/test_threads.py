"""Several threads use one model: what one of them asks for is no other's, and what is everybody's waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import meft_kernels

from ..models import TRAINABLE_START, tiny_batch, tiny_llama

WAIT = 30.0
"""Seconds that a thread is given to come; nothing takes as long."""
GRACE = 0.4
"""Seconds in which one that must not come would have come."""


def patched(**settings: Any) -> nn.Module:
    torch.manual_seed(5)
    return meft_kernels.patch(tiny_llama(), **{**TRAINABLE_START, **settings}).train()


def logits_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


def gradients_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(model(**batch).loss, trained))


class Other:
    """A thread that computes something; its result, or what it raised, at the end."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._result = function()
        except BaseException as error:  # for the thread that waits
            self._error = error

    def result(self) -> Any:
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return self._result


class Stop:
    """Holds the first thread that comes to a layer up in the middle of its pass."""

    def __init__(self, layer: nn.Module) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self._first = threading.Lock()
        self._handle = layer.register_forward_pre_hook(self._hook)

    def _hook(self, *_: Any) -> None:
        if self._first.acquire(blocking=False):
            self.reached.set()
            self.go.wait(GRACE)
            self._handle.remove()


def test_disable_adapter_is_its_threads_own() -> None:
    model = patched(fraction_bits=18)
    batch = tiny_batch(model)
    expected, gradients = logits_of(model, batch), gradients_of(model, batch)
    with meft_kernels.disable_adapter(model):
        pretrained = logits_of(model, batch)
        assert torch.equal(Other(lambda: logits_of(model, batch)).result(), expected)
        found = Other(lambda: gradients_of(model, batch)).result()
    assert not torch.equal(pretrained, expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, gradients, strict=True))


def test_disable_adapter_in_the_middle_of_another_threads_pass() -> None:
    model = patched(fraction_bits=18)
    batch = tiny_batch(model)
    expected = logits_of(model, batch)
    stop = Stop(model.model.layers[1].mlp)
    other = Other(lambda: logits_of(model, batch))
    assert stop.reached.wait(WAIT)
    with meft_kernels.disable_adapter(model):
        stop.go.set()
        assert torch.equal(other.result(), expected)


def test_first_batches_at_once_are_calibrated_once_and_their_gradients_exact() -> None:
    model = patched()
    batch, larger = tiny_batch(model), tiny_batch(model, rows=4, tokens=11, seed=3)
    meft_kernels.calibrate(model, larger)
    expected = gradients_of(model, batch), gradients_of(model, larger)
    bits = meft_kernels.describe(model).stacks[0].fraction_bits

    model = patched()
    stop = Stop(model.model.layers[1].mlp)  # the pass that calibrates
    first = Other(lambda: gradients_of(model, larger))
    assert stop.reached.wait(WAIT)
    second = Other(lambda: gradients_of(model, batch))  # with the probe of the first, it would be done before that
    assert meft_kernels.describe(model).stacks[0].fraction_bits is None
    for found, wanted in ((first.result(), expected[1]), (second.result(), expected[0])):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    assert meft_kernels.describe(model).stacks[0].fraction_bits == bits


def test_training_at_once() -> None:
    model = patched(fraction_bits=18)
    batches = [tiny_batch(model, seed=seed) for seed in range(3)]
    expected = [gradients_of(model, batch) for batch in batches]
    others = [Other(lambda batch=batch: gradients_of(model, batch)) for batch in batches]  # type: ignore[misc]
    for other, wanted in zip(others, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other.result(), wanted, strict=True))


def test_set_adapter_waits_for_passes_of_other_threads() -> None:
    model = patched(fraction_bits=18)
    torch.manual_seed(6)
    meft_kernels.add_adapter(model, "b")
    batch = tiny_batch(model)
    default = logits_of(model, batch)
    meft_kernels.set_adapter(model, "b")
    b = logits_of(model, batch)
    meft_kernels.set_adapter(model, "default")
    assert not torch.equal(default, b)

    stop = Stop(model.model.layers[1].mlp)
    other = Other(lambda: logits_of(model, batch))
    assert stop.reached.wait(WAIT)
    meft_kernels.set_adapter(model, "b")
    stop.go.set()
    assert torch.equal(other.result(), default)
    assert torch.equal(logits_of(model, batch), b)


def test_set_adapter_in_the_middle_of_a_pass_is_refused() -> None:
    model = patched(fraction_bits=18)
    meft_kernels.add_adapter(model, "b")
    batch = tiny_batch(model)
    before = logits_of(model, batch)
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_pre_hook(lambda *_: meft_kernels.set_adapter(model, "b"))
    with pytest.raises(meft_kernels.ReversibleUsageError, match="in the middle of a forward pass"):
        logits_of(model, batch)
    handle.remove()
    assert meft_kernels.adapter_names(model) == ("default", "b")
    assert torch.equal(logits_of(model, batch), before)
