"""Liger-Kernel's norms, SwiGLU, RoPE and fused loss inside reversible layers. Run by ``test_liger``.

Interpreted where there is no GPU, with stand-ins for what Triton's interpreter lacks.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import triton.language as tl
from liger_kernel.ops import cross_entropy, geglu, rms_norm
from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
from torch import nn
from triton.runtime import interpreter

import meft_kernels
from meft_kernels.ops.adapter import triton_forward
from tests.models import TRAINABLE_START, StreamWitness, relative_error, tiny_batch, train_step, worst_error

if triton_forward.INTERPRETED:
    # A compiled kernel gets a number as float32; the interpreter hands on Python's float, which has no `.to`.
    _convert = interpreter._implicit_cvt

    def _as_compiled(argument: Any) -> Any:
        if not isinstance(argument, float):
            return _convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = _as_compiled
    # CUDA's own functions are stubs there.
    rms_norm.rsqrt = lambda x: 1 / tl.sqrt(x)
    geglu.tanh = cross_entropy.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1

DEVICE = "cpu" if triton_forward.INTERPRETED else "cuda"
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
FAMILIES = ("Llama", "Qwen3", "Gemma2", "Gemma3Text", "Olmo2")


def _model(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    return getattr(transformers, name)(config).eval().to(DEVICE)


def _patched(model: nn.Module, **settings: Any) -> nn.Module:
    torch.manual_seed(5)
    return meft_kernels.patch(model, impl="torch", fraction_bits=18, **{**TRAINABLE_START, **settings}).train()


@pytest.fixture(autouse=True)
def _modules_as_they_were() -> Iterator[None]:
    """Liger also puts its functions into transformers' modules, RoPE's among them."""
    modules = [sys.modules[type(_model(family)).__module__] for family in FAMILIES]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, before, strict=True):
        vars(module).update(names)


@pytest.mark.parametrize(("family", "before"), [*((family, True) for family in FAMILIES), ("Llama", False)])
def test_gradients(family: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain autograd of the same model, and against the model without Liger."""
    calls: list[bool] = []
    backward = rms_norm.LigerRMSNormFunction.backward

    def spy(ctx: Any, *gradients: Any) -> Any:
        calls.append(ctx.in_place)
        return backward(ctx, *gradients)

    monkeypatch.setattr(rms_norm.LigerRMSNormFunction, "backward", staticmethod(spy))
    plain = _model(family)
    batch = {name: tensor.to(DEVICE) for name, tensor in tiny_batch(plain).items()}
    model, oracle = copy.deepcopy(plain), copy.deepcopy(plain)
    unfused_loss, unfused = train_step(_patched(plain), batch)
    assert not calls
    if before:
        _apply_liger_kernel_to_instance(model=model)
        _patched(model)
    else:
        _patched(model)
        _apply_liger_kernel_to_instance(model=model)
    witness = StreamWitness(model)
    loss, gradients = train_step(model, batch)
    witness.assert_exact(2)
    assert calls
    _apply_liger_kernel_to_instance(model=oracle)
    expected_loss, expected = train_step(_patched(oracle, engine="autograd"), batch)
    assert loss == expected_loss
    assert worst_error(gradients, expected) <= 1e-5
    # Sums of at most 128 products in another order, through two layers: some tens of fp32's 6e-8.
    assert loss == pytest.approx(unfused_loss, rel=1e-5)
    assert relative_error(gradients, unfused) <= 1e-5
