"""Layers left out at random in training: a skipped layer is skipped in the inverse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels.patching.state import require_state

from ..models import VARIANTS, StreamWitness, worst_error
from .exactness import FP32_BOUND, patched, step
from .zoo import batch_for, tiny


def runs(name: str, variant: str, engine: str, seed: int) -> tuple[float, dict[str, torch.Tensor], list[list[int]]]:
    """Loss, gradients, and the layers that ran, of a model whose layers are left out as ``seed`` decides."""
    model = patched(tiny(name), variant=variant, engine=engine, fraction_bits=16).train()
    witnesses = StreamWitness.on_every_stack(model)
    loss, gradients = step(model, batch_for(model), seed=seed)
    if engine == "reversible":
        for witness in witnesses:
            assert witness.before.keys() == witness.equal.keys()
            assert all(witness.equal.values())
    return loss, gradients, [sorted(witness.before) for witness in witnesses]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["opt-layerdrop", "bart-layerdrop"])
def test_skipped_layers_are_skipped_in_the_inverse(name: str, variant: str) -> None:
    patterns = set()
    for seed in range(12):
        loss, gradients, ran = runs(name, variant, "reversible", seed)
        expected_loss, expected, _ = runs(name, variant, "autograd", seed)
        assert loss == expected_loss
        assert worst_error(gradients, expected) <= FP32_BOUND if gradients else not expected
        touched = {int(key.split(".meft.")[0].rsplit(".", 1)[1]) for key in gradients if ".meft." in key}
        assert touched == {index for indices in ran for index in indices}
        patterns.add(tuple(map(tuple, ran)))
    first = [pattern[0] for pattern in patterns]
    total = len(tiny(name).base_model.get_submodule("decoder.layers"))
    assert len(patterns) > 4
    assert any(layers and layers[0] > 0 for layers in first)  # the first layer was skipped,
    assert any(layers and layers[-1] < total - 1 for layers in first)  # the last one,
    assert any(b - a > 1 for layers in first for a, b in pairwise(layers))  # one between


def test_every_layer_skipped() -> None:
    model = patched(tiny("opt", layerdrop=1.0), fraction_bits=16).train()
    batch = batch_for(model)
    logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    assert not logits.requires_grad  # nothing trainable took part
    assert torch.equal(model(**batch).logits, logits)


def test_no_layer_is_skipped_in_eval_or_in_calibration() -> None:
    model = patched(tiny("opt", layerdrop=0.9, num_hidden_layers=5)).train()
    batch = batch_for(model)
    largest: list[Any] = []
    stack = require_state(model).stacks[0]
    for layer in stack.layers:
        layer.module.register_forward_hook(lambda module, args, output, index=layer.index: largest.append(index))
    meft_kernels.calibrate(model, batch)
    assert sorted(set(largest)) == [0, 1, 2, 3, 4]
    largest.clear()
    model.eval()(**batch)
    assert largest == [0, 1, 2, 3, 4]


def test_overflow_is_raised_where_the_last_layer_was_skipped() -> None:
    model = patched(tiny("opt", layerdrop=0.4, num_hidden_layers=5), fraction_bits=27).train()
    with torch.no_grad():
        for parameter in model.base_model.decoder.layers.parameters():
            parameter.mul_(10)
    raised = 0
    for seed in range(8):
        torch.manual_seed(seed)
        try:
            model(**batch_for(model))
        except meft_kernels.StreamOverflowError:
            raised += 1
    assert raised >= 7  # all but the pass, if there is one, that left out every layer
