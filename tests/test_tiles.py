"""Position-wise parts in tiles: how hidden states are cut, what it saves, and what it must not change."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import meft_kernels
from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS
from meft_kernels.engine.tiles import ALIGNMENT, Tile, cut, joined
from meft_kernels.estimate import twin
from meft_kernels.estimate.estimator import Estimator
from meft_kernels.memory import LiveTensorMeter

from .models import (
    TRAINABLE_START,
    VARIANTS,
    StreamWitness,
    pair,
    relative_error,
    tiny_batch,
    tiny_bert,
    tiny_llama,
    train_step,
    worst_error,
)

FP32_BOUND = 1e-5
"""Gradients of two evaluations in float32 that differ in the order of a few additions: measured 1e-9 to 3e-7."""


@given(batch=st.integers(0, 5), tokens=st.integers(0, 300), rows=st.integers(1, 400), flat=st.booleans())
def test_tiles_cover_all_rows_once_and_in_order(batch: int, tokens: int, rows: int, flat: bool) -> None:
    shape = torch.Size((batch * tokens, 2)) if flat else torch.Size((batch, tokens, 2))
    numbered = torch.arange(math.prod(shape)).view(shape)
    tiles = cut(shape, rows)
    parts = [tile.of(numbered) for tile in tiles]
    assert torch.equal(torch.cat([part.reshape(-1, 2) for part in parts]), numbered.view(-1, 2))
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(joined(parts, shape), numbered)
    most = rows + ALIGNMENT - 1 if rows > ALIGNMENT else rows
    assert all(part[..., 0].numel() <= most for part in parts)
    positions = torch.arange(tokens).view(1, tokens)
    if not flat and len(tiles) > 1:
        for tile in tiles:
            expected = positions.expand(batch, tokens)[tile.texts, tile.tokens]
            assert torch.equal(tile.by_position(positions).expand(expected.shape), expected)


def test_other_shapes_stay_whole() -> None:
    for shape in (torch.Size((7,)), torch.Size((2, 3, 4, 5))):
        assert cut(shape, 1) == [Tile()]
        assert cut(shape, 1)[0].is_whole


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "lots", None, "8"])
def test_bad_tiles_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="tile"):
        MeftConfig(tile=value)


@pytest.mark.parametrize("name", ["attention", "remainders"])
def test_bad_choices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        MeftConfig(**{name: "sometimes"})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lean_norms", "inplace_gradients"])
def test_switches_are_booleans(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False"):
        MeftConfig(**{name: "yes"})  # type: ignore[arg-type]


def test_a_tile_of_more_rows_than_there_are_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, oracle = pair("llama", tile=54321)
    batch = tiny_batch(model)
    with caplog.at_level(logging.WARNING, logger="meft_kernels"):
        loss, gradients = train_step(model, batch)
        train_step(model, batch)
    assert [record.message.count("tile=54321") for record in caplog.records] == [1]
    expected_loss, expected = train_step(oracle, batch)
    assert loss == expected_loss
    assert worst_error(gradients, expected) <= FP32_BOUND


def test_a_tile_of_as_many_rows_as_there_are_is_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    model = meft_kernels.patch(tiny_llama(), tile=1, **TRAINABLE_START)
    model(**tiny_batch(model, 1, 1)).loss.backward()
    assert "more rows" not in caplog.text


EVERYTHING = {"tile": 3, "attention": "pieces", "remainders": "host"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("settings", [{"tile": 3}, EVERYTHING], ids=["tiles", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(variant: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Rebuilt bit for bit, the same forward as plain autograd, and no further from the float32 truth than that."""
    squares = {"reversible": 0.0, "autograd": 0.0}
    for seed in range(6):
        batch = tiny_batch(tiny_llama(), rows=3, seed=seed)
        truth = train_step(_made(torch.float32, variant, "autograd", settings), batch)[1]
        losses = []
        for engine in squares:
            model = _made(dtype, variant, engine, settings)
            witness = StreamWitness(model)
            loss, gradients = train_step(model, batch)
            if engine == "reversible":
                witness.assert_exact(3)
            losses.append(loss)
            squares[engine] += relative_error(gradients, truth) ** 2
        assert losses[0] == losses[1]
    # Six batches scatter the ratio of the two by a tenth to either side of 1.
    assert squares["reversible"] <= 1.2**2 * squares["autograd"]


def _made(dtype: torch.dtype, variant: str, engine: str, settings: dict[str, Any]) -> nn.Module:
    model = tiny_llama().to(dtype)
    torch.manual_seed(5)
    made = meft_kernels.patch(
        model, variant=variant, engine=engine, adapter_dtype="model", fraction_bits=18, **TRAINABLE_START, **settings
    )
    return made.train()


@pytest.mark.parametrize("settings", [{"tile": 3}, EVERYTHING], ids=["tiles", "everything"])
def test_autocast(settings: dict[str, Any]) -> None:
    model, oracle = pair("llama", fraction_bits=18, **settings)
    batch = tiny_batch(model)
    witness = StreamWitness(model)
    found = []
    for each in (model, oracle):
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = each(**batch).loss
        loss.backward()  # outside of the block, as in most loops
        found.append({name: p.grad.clone() for name, p in each.named_parameters() if p.grad is not None})
    witness.assert_exact(3)
    assert relative_error(*found) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("settings", [{"tile": 3}, EVERYTHING], ids=["tiles", "everything"])
def test_a_lora_inside(settings: dict[str, Any]) -> None:
    """Its dropout draws the same numbers in every tile's recompute, and both its matrices get their gradients."""
    peft = pytest.importorskip("peft")
    found = []
    for engine in ("reversible", "autograd"):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, init_lora_weights="gaussian")
        model = peft.get_peft_model(tiny_llama(), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        meft_kernels.patch(model, adapters="none", engine=engine, **settings).train()
        found.append(train_step(model, tiny_batch(model)))
    assert found[0][0] == found[1][0]
    assert worst_error(found[0][1], found[1][1]) <= FP32_BOUND


@pytest.mark.parametrize("settings", [{"frozen_layers": 1}, {"reversible_layers": 2}, {"reversible_layers": 0}])
def test_layers_left_out(settings: dict[str, Any]) -> None:
    model, oracle = pair("llama", **EVERYTHING, **settings)
    batch = tiny_batch(model)
    loss, gradients = train_step(model, batch)
    expected_loss, expected = train_step(oracle, batch)
    assert loss == expected_loss
    assert worst_error(gradients, expected) <= FP32_BOUND


def test_eval_computes_what_training_does() -> None:
    """Also with a KV cache, which attention fills while the MLP runs in tiles."""
    model = meft_kernels.patch(tiny_llama(), tile=3, inference="exact", **TRAINABLE_START)
    batch = tiny_batch(model)
    trained = model.train()(**batch).logits
    model.eval()
    with torch.no_grad():
        cached = model(**batch, use_cache=True)
        assert torch.equal(trained, cached.logits)
        assert torch.equal(trained, model(**batch, use_cache=False).logits)
    assert cached.past_key_values.get_seq_length() == batch["input_ids"].shape[1]


def test_a_verified_model_and_a_copied_one() -> None:
    model = meft_kernels.patch(tiny_bert(), **EVERYTHING, **TRAINABLE_START).train()
    batch = tiny_batch(model)
    report = meft_kernels.verify(model, batch)
    assert report.bit_exact
    assert report.repeats
    assert report.blocks_match
    assert report.gradient_error <= FP32_BOUND
    twin = copy.deepcopy(model)
    (loss, gradients), (again, of_twin) = train_step(model, batch), train_step(twin, batch)
    assert loss == again
    assert all(torch.equal(gradients[name], of_twin[name]) for name in gradients)


def test_what_is_as_wide_as_the_ffn_exists_for_one_tile() -> None:
    """A layer's recompute whose FFN is 16 times as wide as its hidden states: peak of a step, in bytes."""
    model = tiny_llama(2, 64, intermediate_size=1024)
    ids = torch.randint(1, 90, (1, 512), generator=torch.Generator().manual_seed(0))
    peaks = {}
    for tile in ("off", 64):
        patched = meft_kernels.patch(copy.deepcopy(model), tile=tile, loss="full", fraction_bits=18).train()
        patched(input_ids=ids, labels=ids).loss.backward()
        with LiveTensorMeter() as meter:
            patched(input_ids=ids, labels=ids).loss.backward()
        peaks[tile] = meter.peak_bytes
    # gate, up, activation and product, in float32, of all rows but one tile's
    assert peaks["off"] - peaks[64] >= 4 * 4 * 1024 * (512 - 64) - 4 * 64 * 512 * 4


def test_one_that_writes_into_its_input_is_told_of() -> None:
    model = meft_kernels.patch(tiny_llama(), tile=3, **TRAINABLE_START).train()
    norm = model.model.layers[1].post_attention_layernorm

    def overwrite(module: nn.Module, args: Any) -> None:
        args[0].data.add_(0)  # by .data: autograd itself does not see it
        with torch.no_grad():
            args[0].mul_(1.0)

    norm.register_forward_pre_hook(overwrite)
    with pytest.raises(meft_kernels.ReversibleUsageError, match="wrote into its own input"):
        model(**tiny_batch(model))


@pytest.mark.parametrize("rows", [1, 2])
def test_hidden_states_in_any_order_of_memory(rows: int) -> None:
    """A gradient that arrives transposed in memory is accumulated into a dense copy."""
    model, oracle = pair("llama", tile=3)
    batch = tiny_batch(model, rows=rows)
    weights = torch.randn(64, 7, rows, generator=torch.Generator().manual_seed(3)).permute(2, 1, 0)
    found = []
    for each in (model, oracle):
        hidden = each.model(input_ids=batch["input_ids"]).last_hidden_state
        hidden.backward(weights)
        found.append({name: p.grad.clone() for name, p in each.named_parameters() if p.grad is not None})
        each.zero_grad()
    assert worst_error(*found) <= FP32_BOUND


@pytest.mark.parametrize("settings", [{}, {"attention": "pieces", "remainders": "host"}])
def test_simulations_leave_out_tiles_to_the_byte(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tiles of 64 rows, of which the estimator runs four."""
    config = tiny_llama(1).config
    config.architectures = ["LlamaForCausalLM"]
    found = []
    for context in (twin.shortening, contextlib.nullcontext):
        monkeypatch.setattr(twin, "shortening", context)
        estimator = Estimator(config, torch.float32, 1, MeftConfig(tile=64, **settings), gpu=False)
        found.append(estimator.simulate(config, RIVALS["meft"], 640))
    assert found[0].kept == found[1].kept
    assert found[0].host == found[1].host
    assert abs(found[0].peak - found[1].peak) <= 8 * 2 * 10  # a checksum and a status of every tile, 8 bytes each
