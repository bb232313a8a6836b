"""Passes that nobody will go back through: the function that was trained, in floating point."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels import NonFiniteError, ReversibleUsageError
from meft_kernels.patching.state import require_state

from .architectures.zoo import batch_for, tiny
from .models import TRAINABLE_START, tiny_batch, tiny_bert, tiny_llama, train_step

FINE = 22
"""Fraction bits; streams of tiny models are small, so the fixed point's step is below float32's at magnitude 1."""
ROUNDING = 2e-5
"""Of that fixed point and of float32's sums, against logits."""


def both(model: Any, **settings: Any) -> tuple[Any, Any]:
    """Patched alike but for how inference runs."""
    made = []
    for inference in ("float", "exact"):
        fresh = model()
        torch.manual_seed(5)
        settings = {**TRAINABLE_START, "fraction_bits": FINE, **settings}
        made.append(meft_kernels.patch(fresh, inference=inference, **settings).eval())
    return made[0], made[1]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "meft1": {"variant": "meft1"},
    "meft3": {"variant": "meft3"},
    "paper": {"coupling": "paper", "arithmetic": "float", "fraction_bits": None, "readout": "mean"},
    "other coefficients": {"lam": -1 / 2, "beta": -1 / 3},
    "frozen below": {"frozen_layers": 1},
    "tiles": {"tile": 3},
    "tiles, meft3": {"tile": 3, "variant": "meft3"},
    "pieces": {"tile": 3, "attention": "pieces"},
    "no adapters": {"adapters": "none"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_the_same_function(build: Any, settings: dict[str, Any]) -> None:
    model, exact = both(build, **settings)
    batch = tiny_batch(model, rows=3, tokens=9)
    with torch.no_grad():
        found, expected = (each(**batch, output_hidden_states=True) for each in (model, exact))
    assert distance(found.logits, expected.logits) < ROUNDING
    assert distance(found.loss, expected.loss) < ROUNDING
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert distance(mine, theirs) < ROUNDING
    with torch.no_grad():
        again = model(**batch).logits
    assert torch.equal(again + 0, found.logits + 0)  # who looks changes nothing
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits + 0, again + 0)


@pytest.mark.parametrize("name", ["t5", "gpt2", "deberta-v2", "vit"])
def test_other_families(name: str) -> None:
    """Position biases that layers share, encoders and decoders, images."""
    model, exact = both(lambda: tiny(name))
    batch = batch_for(model)
    with torch.no_grad():
        found, expected = (each(**batch)[0 if "labels" not in batch else 1] for each in (model, exact))
    assert distance(found, expected) < ROUNDING


def test_in_bfloat16_it_differs_as_bfloat16_does() -> None:
    """Streams are float32 there: no further from the exact path than one rounding of the hidden states moves it."""
    model, exact = both(lambda: tiny_llama(6).bfloat16())
    batch = tiny_batch(model)
    with torch.no_grad():
        found, expected = (each(**batch).logits + 0 for each in (model, exact))
        wide = meft_kernels.unpatch(exact).float()
        torch.manual_seed(5)
        meft_kernels.patch(wide, **TRAINABLE_START, fraction_bits=FINE, inference="exact").eval()
        usual = distance(wide(**batch).logits, expected)
    assert distance(found, expected) < usual


def test_which_passes_it_is() -> None:
    """Eval mode and no gradients; all others are those of training, bit for bit."""
    model, exact = both(tiny_bert, dropout=0.0)
    batch = tiny_batch(model)
    seen: list[str] = []
    stack = require_state(model).stacks[0]
    stack.layers[1].module.register_forward_hook(lambda *_: seen.append(type(stack.passes.current).__name__))
    with torch.no_grad():
        model(**batch)
        model.train()(**batch)
    model.eval()(**batch).loss.backward()
    assert seen == ["InferencePass", "Pass", "Pass"]
    for each in (model, exact):
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    with torch.no_grad():
        losses = [each.train()(**batch).loss for each in (model, exact)]
    assert torch.equal(*losses)
    assert torch.equal(losses[0], model(**batch).loss)


def test_calibration_is_trainings_own() -> None:
    """What is generated before does not decide what training's first batch does; ``calibrate`` does."""
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).eval()
    batch = tiny_batch(model)
    with torch.no_grad():
        model(**batch)
    assert meft_kernels.describe(model).stacks[0].fraction_bits is None
    (bits,) = meft_kernels.calibrate(model, batch)
    assert bits is not None
    assert meft_kernels.describe(model).stacks[0].fraction_bits == bits
    with torch.no_grad():
        model(**batch)
    assert meft_kernels.describe(model).stacks[0].fraction_bits == bits


def test_an_evaluation_between_two_steps_changes_nothing() -> None:
    results = []
    for evaluates in (False, True):
        model = tiny_bert()
        torch.manual_seed(5)
        meft_kernels.patch(model, **TRAINABLE_START, fraction_bits=FINE)
        batch = tiny_batch(model)
        losses = []
        for seed in range(3):
            losses.append(train_step(model.train(), batch, seed)[0])
            if evaluates:
                with torch.no_grad():
                    model.eval()(**batch)
        results.append(losses)
    assert results[0] == results[1]


def test_a_hook_that_writes_between_two_layers_is_refused() -> None:
    model, _ = both(tiny_llama)
    for change in (lambda *_: torch.zeros(2, 7, 64), lambda _, __, output: output.add_(1)):
        handle = model.model.layers[0].register_forward_hook(change)
        with torch.no_grad(), pytest.raises(ReversibleUsageError, match="are not those that the layer before returned"):
            model(**tiny_batch(model))
        handle.remove()


def test_a_layer_that_writes_into_its_input_is_refused() -> None:
    model, _ = both(tiny_llama)
    model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda _, args: (args[0].mul_(2),))
    with torch.no_grad(), pytest.raises(ReversibleUsageError, match="wrote into its own input"):
        model(**tiny_batch(model))


def test_gradients_recorded_inside_alone_are_refused() -> None:
    model, _ = both(tiny_llama)
    layer = model.model.layers[1]
    forward = layer.forward

    @torch.enable_grad()
    def recorded(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    layer.forward = recorded
    with torch.no_grad(), pytest.raises(ReversibleUsageError, match="were not where its model was called"):
        model(**tiny_batch(model))


def test_out_of_order_and_left_early() -> None:
    model, _ = both(tiny_llama)
    batch = tiny_batch(model)
    layers = model.model.layers
    with torch.no_grad():
        expected = model(**batch).logits + 0
        model.model.layers = torch.nn.ModuleList([layers[1], layers[0], layers[2]])
        with pytest.raises(ReversibleUsageError, match="reversible layers run in the order"):
            model(**batch)
        model.model.layers = layers[:2]
        with pytest.raises(ReversibleUsageError, match="the streams were never read out"):
            model(**batch)
        model.model.layers = layers
        assert torch.equal(model(**batch).logits + 0, expected)


def test_nan_is_told() -> None:
    model, _ = both(tiny_bert)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=r"leave bert\.encoder\.layer"):
            model(**tiny_batch(model))


def test_it_is_no_setting_of_the_adapter(tmp_path: Any) -> None:
    model, exact = both(tiny_llama)
    meft_kernels.save_adapter(exact, tmp_path)
    assert require_state(meft_kernels.load_adapter(tiny_llama(), tmp_path)).config.inference == "float"
    meft_kernels.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="inference must be one of float, exact"):
        meft_kernels.patch(tiny_llama(), inference="fast")
