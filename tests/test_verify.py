"""verify() and calibrate(): the report is true, and the model is left as it was."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import meft_kernels
from meft_kernels import ReversibleUsageError
from meft_kernels.engine.calibration import Probe
from meft_kernels.patching.state import require_state

from .models import FAMILIES, TRAINABLE_START, VARIANTS, tiny_batch, tiny_bert, tiny_llama


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_report(family: str, variant: str) -> None:
    model = meft_kernels.patch(FAMILIES[family](), variant=variant, **TRAINABLE_START).train()
    batch = tiny_batch(model, rows=4, tokens=8)
    report = meft_kernels.verify(model, batch)
    assert report.bit_exact
    assert report.first_mismatch is None
    assert report.repeats
    assert report.layers == 3
    assert report.gradient_error <= 1e-5
    bits = 12 if variant == "meft3" else 8
    assert report.saved_bytes_per_layer == 4 * 8 * 64 * bits / 8 + 16  # and two checksums
    assert report.start_loss == pytest.approx(report.base_loss, abs=0.5)
    assert str(report).splitlines()[0].startswith("verdict                    exact: 3 of 3 reversible layers rebuilt")
    assert 0 < report.kept_bytes < report.autograd_bytes
    assert f"{100 - 100 * report.kept_bytes / report.autograd_bytes:.0f} % saved on this batch" in str(report)


def test_bytes_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the comparisons count them, of this model and of the one that keeps everything."""
    from meft_kernels.comparison.loop import footprint

    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    batch = tiny_batch(model)
    report = meft_kernels.verify(model, batch)
    assert report.kept_bytes == footprint(model, batch).kept
    plain = meft_kernels.patch(tiny_llama(), engine="autograd", **TRAINABLE_START).train()
    plain(**batch)
    assert report.autograd_bytes == footprint(plain, batch).kept


def test_base_loss_is_that_of_the_unpatched_model() -> None:
    model = tiny_llama()
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch).loss.item()
    report = meft_kernels.verify(meft_kernels.patch(model, **TRAINABLE_START), batch)
    assert report.base_loss == expected
    assert report.start_loss != expected


def test_float_arithmetic_is_reported_as_not_exact() -> None:
    model = meft_kernels.patch(tiny_llama(layers=6), meft_kernels.MeftConfig.paper("meft3")).train()
    report = meft_kernels.verify(model, tiny_batch(model))
    assert not report.bit_exact
    assert report.first_mismatch is not None
    assert report.gradient_error > 1e-5
    assert report.fraction_bits == (None,)
    assert report.verdict == f"NOT exact: the input of {report.first_mismatch} was not rebuilt bit for bit"


def test_verdicts() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    report = meft_kernels.verify(model, tiny_batch(model))
    for changed, said in (
        ({"layers": 0, "bit_exact": False}, "NOT checked"),
        ({"gradient_error": math.inf, "worst_gradient": ("head", math.inf)}, "the gradient of head is not that of"),
        ({"repeats": False}, "the loss is another"),
    ):
        assert said in dataclasses.replace(report, **changed).verdict


def test_without_labels() -> None:
    model = meft_kernels.patch(tiny_bert().bert, **TRAINABLE_START)
    report = meft_kernels.verify(model, {"input_ids": tiny_batch(model)["input_ids"]})
    assert report.bit_exact
    assert report.start_loss is None


def test_model_is_left_as_it_was() -> None:
    model = meft_kernels.patch(tiny_bert(), **TRAINABLE_START).train()
    model.bert.encoder.layer[1].eval()
    batch = tiny_batch(model)
    model(**batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = torch.random.get_rng_state()
    meft_kernels.verify(model, batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(dict(model.named_parameters())[name].grad, g) for name, g in gradients.items())
    assert model.training
    assert not model.bert.encoder.layer[1].training
    assert require_state(model).stacks[0].observer is None
    assert require_state(model).stacks[0].engine == "reversible"


def test_parameters_without_a_gradient_are_named() -> None:
    """Both engines leave them out alike, which is no proof of anything."""
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START)
    model.idle = torch.nn.Parameter(torch.ones(3))
    report = meft_kernels.verify(model, tiny_batch(model))
    assert report.without_gradient == ("idle",)
    assert report.gradient_error <= 1e-5
    assert "without a gradient" in str(report)
    del model.idle
    assert meft_kernels.verify(model, tiny_batch(model)).without_gradient == ()


def test_no_gradient_at_all_is_no_agreement() -> None:
    model = meft_kernels.patch(tiny_llama().requires_grad_(False), adapters="none")
    model.idle = torch.nn.Parameter(torch.ones(3))
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    report = meft_kernels.verify(model, tiny_batch(model))
    assert report.without_gradient == ("idle",)
    assert math.isinf(report.gradient_error)
    assert report.worst_gradient == ("idle", math.inf)


def test_nothing_trainable() -> None:
    model = meft_kernels.patch(tiny_llama().requires_grad_(False), adapters="none")
    with pytest.raises(ReversibleUsageError, match="nothing in this model is trainable"):
        meft_kernels.verify(model, tiny_batch(model))


def test_calibration_leaves_headroom_and_no_trace() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START)
    batch = tiny_batch(model)
    state = torch.random.get_rng_state()
    (bits,) = meft_kernels.calibrate(model, batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    (stack,) = require_state(model).stacks
    seen = []

    class Largest:
        def forward(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
            seen.append(max(float(x1.abs().max()), float(x2.abs().max())))

    stack.observer = Largest()
    with torch.no_grad():
        model(**batch)
    assert 4 * max(seen) <= 2**30
    assert bits == 22 or 16 * max(seen) > 2**30  # and not finer than need be
    assert meft_kernels.calibrate(model, batch) == (bits,)


@pytest.mark.parametrize(("largest", "bits"), [(25306.0, 13), (16384.0, 14), (1.0, 22), (1e12, 0)])
def test_fraction_bits(largest: float, bits: int) -> None:
    probe = Probe()
    probe.enter(torch.tensor([largest, largest / 2]))
    assert probe.fraction_bits_for(22, "layers") == bits
    if bits:
        assert largest * 2**bits * 4 <= 2**30


def test_coarse_resolution_is_told(caplog: pytest.LogCaptureFixture) -> None:
    probe = Probe()
    probe.enter(torch.tensor([1e6, 1e6]))
    probe.enter(torch.tensor([1e-3, 1e-3]))
    probe.fraction_bits_for(22, "layers")
    assert "the start loss may move" in caplog.text


def test_one_large_token_does_not_hide_what_becomes_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    hidden_states = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    hidden_states[0, 5] *= 1e6
    hidden_states[0, -3:] = 0.0  # padding
    probe = Probe()
    probe.enter(hidden_states)
    bits = probe.fraction_bits_for(22, "layers")
    assert "the start loss may move" in caplog.text
    assert bits == 6
    caplog.clear()
    probe = Probe()
    probe.enter(hidden_states.clamp(-100, 100))
    probe.fraction_bits_for(22, "layers")
    assert not caplog.text


def test_calibrating_what_was_given() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=12)
    with pytest.raises(ReversibleUsageError, match="fraction_bits=12 was given"):
        meft_kernels.calibrate(model, tiny_batch(model))
    assert math.isfinite(model(**tiny_batch(model)).loss)


@pytest.mark.parametrize("by_position", [False, True])
def test_calibration_with_a_cache_does_not_fill_it(by_position: bool) -> None:
    from transformers import DynamicCache

    model = meft_kernels.patch(tiny_llama(), inference="exact", **TRAINABLE_START)
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        if by_position:
            model.model(ids, None, None, cache)
        else:
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 3
