"""Norms that keep their input alone: the module's own bits and gradients, by rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.sam.modeling_sam import SamLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import meft_kernels
from meft_kernels.engine.norms import LeanNorm, lean_norms
from meft_kernels.memory import LiveTensorMeter

from .models import tiny_batch, tiny_bert, tiny_llama, worst_error

NORMS = [LlamaRMSNorm, Gemma2RMSNorm, T5LayerNorm]


def _norm(cls: Any, dtype: torch.dtype, size: int = 100) -> nn.Module:
    torch.manual_seed(0)
    norm = cls(size).to(dtype)
    nn.init.normal_(norm.weight)
    return norm


def _run(norm: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    targets = [leaf, *(p for p in norm.parameters() if p.requires_grad)]
    return y.detach(), *torch.autograd.grad(y, targets, dy)


@pytest.mark.parametrize("cls", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_the_modules_own_bits(cls: Any, dtype: torch.dtype, trained: bool) -> None:
    """63 rows of 100 in parts of 5, strided: outputs and input gradients bit for bit, for every row is by itself."""
    norm = _norm(cls, dtype).requires_grad_(trained)
    x = torch.randn(9, 7, 200)[..., ::2].to(dtype)
    dy = torch.randn(9, 7, 100).to(dtype)
    expected = _run(norm, x, dy)
    lean = LeanNorm(norm, 5)
    lean.bind()
    found = _run(norm, x, dy)
    with torch.no_grad():
        assert torch.equal(norm(x), expected[0])
    lean.unbind()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    if trained:  # a sum over 63 rows in another order: half an eps for each of 13 parts that are added up
        size = expected[2].abs().max()
        assert (found[2] - expected[2]).abs().max() <= 13 * torch.finfo(dtype).eps * size


def test_empty_and_few_rows_go_to_the_norm_as_it_was() -> None:
    norm = _norm(LlamaRMSNorm, torch.float32)
    lean = LeanNorm(norm, 64)
    lean.bind()
    for rows in (0, 1, 64):
        x = torch.randn(rows, 100, requires_grad=True)
        y = norm(x)
        assert "_ByRows" not in type(y.grad_fn).__name__
        assert y.shape == x.shape


def test_it_keeps_its_input_alone() -> None:
    kept = []
    for rows in (None, 64):
        norm = _norm(LlamaRMSNorm, torch.bfloat16).requires_grad_(False)
        if rows:
            LeanNorm(norm, rows).bind()
        x = torch.randn(1024, 100, dtype=torch.bfloat16, requires_grad=True)
        with LiveTensorMeter() as meter:
            y = norm(x)
            kept.append(meter.live_bytes - y.nbytes)
    assert kept[1] == 0
    assert kept[0] >= 4 * 1024 * 100


def test_which_norms_are_taken_and_given_back() -> None:
    model = tiny_llama()
    bound = [name for name, module in model.named_modules() if isinstance(module, LlamaRMSNorm)]
    replaced = model.model.layers[1].input_layernorm
    replaced.forward = lambda x: x  # somebody's own, before patch
    meft_kernels.patch(model)
    taken = [name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), LeanNorm)]
    assert taken == [name for name in bound if name != "model.layers.1.input_layernorm"]
    later = model.model.layers[2].input_layernorm
    later.forward = lambda x: x  # and after
    meft_kernels.unpatch(model)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == [
        "model.layers.1.input_layernorm",
        "model.layers.2.input_layernorm",
    ]
    assert lean_norms(tiny_bert(), None) == []  # torch's own kernel keeps no more
    assert lean_norms(SamLayerNorm(8, data_format="channels_first"), None) == []  # channels are no last dimension
    off = meft_kernels.patch(tiny_llama(), lean_norms=False)
    assert not any(isinstance(vars(module).get("forward"), LeanNorm) for module in off.modules())


def test_trained_norms_inside_reversible_layers() -> None:
    results = []
    for lean in (True, False):
        torch.manual_seed(5)
        model = meft_kernels.patch(tiny_llama(), lean_norms=lean, tile=3, up_init_std=0.05, fraction_bits=18).train()
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.requires_grad_(True)
        batch = tiny_batch(model)
        torch.manual_seed(2)
        model(**batch).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("layernorm" in name for name in results[0])
    assert worst_error(results[0], results[1], floor=1e-3) <= 1e-5  # sums over rows in another order
