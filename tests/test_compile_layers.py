"""compile_layers=True: the pretrained layers under torch.compile, with one graph for forward and recompute."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import meft_kernels
from meft_kernels.engine import compiling
from meft_kernels.notices import warn_once

from .architectures.exactness import FP32_BOUND, both_engines
from .architectures.zoo import batch_for, tiny
from .models import TRAINABLE_START, train_step, worst_error


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and differentiated ahead of time as inductor does, and then run by torch's own kernels."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    warn_once.cache_clear()
    counters.clear()
    yield
    torch.compiler.reset()


def patched(name: str, **settings: Any) -> Any:
    model = tiny(name)
    torch.manual_seed(5)
    defaults = {**TRAINABLE_START, "dropout": 0.1, "fraction_bits": 16, "compile_layers": True}
    return meft_kernels.patch(model, **{**defaults, **settings}).train()


def uncached(model: Any, **options: Any) -> dict[str, Any]:
    """A batch without a KV cache, with which layers run uncompiled."""
    batch = batch_for(model, **options)
    return {**batch, "use_cache": False} if hasattr(model.config, "use_cache") else batch


def assert_exact(name: str, *, compiled: tuple[str, ...] = ("reversible",), **settings: Any) -> None:
    """Against plain autograd, uncompiled where torch's own kernels run, which give the same bits."""
    found, expected = both_engines(
        lambda engine: patched(name, engine=engine, compile_layers=engine in compiled, **settings),
        lambda model: train_step(model, uncached(model)),
    )
    assert worst_error(found, expected, floor=1e-3) <= FP32_BOUND


# Llama's meft2 is what test_a_model_without_adapters_lends_no_graph_to_one_with has.
@pytest.mark.parametrize(("name", "variant"), [("llama", "meft3"), ("bert", "meft2"), ("t5", "meft2")])
def test_exact(name: str, variant: str) -> None:
    assert_exact(name, variant=variant)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
def test_exact_with_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    assert_exact("llama", compiled=("reversible", "autograd"))


def test_one_graph_for_all_layers_and_lengths() -> None:
    """Also when forwards and backwards of several lengths interleave: no second graph serves the first's recompute."""
    model = patched("llama")
    batches = [uncached(model, tokens=tokens) for tokens in (7, 9, 12)]
    expected = []
    for batch in batches:
        torch.manual_seed(2)
        expected.append(model(**batch).loss.item())
    graphs = counters["stats"]["unique_graphs"]
    losses = []
    for batch in batches:
        torch.manual_seed(2)
        losses.append(model(**batch).loss)
    assert [loss.item() for loss in losses] == expected
    for loss in losses:
        loss.backward()  # compares checksums
    assert counters["stats"]["unique_graphs"] == graphs == 1


def test_generate_and_eval_run_uncompiled() -> None:
    model = patched("llama", dropout=0.0, inference="exact")
    batch = uncached(model)
    trained = model(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, trained)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = batch["input_ids"]
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def test_a_model_without_adapters_lends_no_graph_to_one_with() -> None:
    """Hooks, the adapters' taps among them, are not guarded by dynamo."""
    bare = patched("llama", adapters="none", modules_to_save=("lm_head",))
    train_step(bare, uncached(bare))
    assert_exact("llama")


def test_hooks_inside_a_layer(caplog: pytest.LogCaptureFixture) -> None:
    model = patched("llama", dropout=0.0)
    seen: list[int] = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.WARNING):
        loss, _ = train_step(model, uncached(model))
    assert "runs uncompiled: hooks are registered inside its layers" in caplog.text
    assert len(seen) == 2  # forward and recompute
    assert loss == pytest.approx(train_step(patched("llama", dropout=0.0), uncached(model))[0], rel=1e-6)


def test_copies_and_what_is_left_behind(tmp_path: Path) -> None:
    model = patched("llama")
    batch = uncached(model)
    loss, _ = train_step(model, batch)
    assert train_step(copy.deepcopy(model), batch)[0] == loss
    meft_kernels.save_adapter(model, tmp_path)
    again = meft_kernels.load_adapter(tiny("llama"), tmp_path)
    assert not meft_kernels.patching.state.require_state(again).config.compile_layers  # how it was run is no part of it
    stacks = len(compiling._compiled)
    meft_kernels.unpatch(model)
    del model
    gc.collect()
    assert len(compiling._compiled) < stacks


def test_verify_says_exact() -> None:
    model = patched("llama")
    report = meft_kernels.verify(model, batch_for(model))
    assert report.bit_exact
    assert report.repeats
    assert report.gradient_error <= FP32_BOUND


def test_bad_value() -> None:
    with pytest.raises(ValueError, match="compile_layers must be True or False"):
        meft_kernels.patch(tiny("llama"), compile_layers="inductor")


def test_exact_in_tiles() -> None:
    """The blocks are compiled apart, each for every tile and layer."""
    both = ("reversible", "autograd")
    assert_exact("llama", tile=3, compiled=both)
    assert_exact("bert", tile=3, compiled=both)
