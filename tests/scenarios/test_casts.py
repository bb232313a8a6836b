"""A model cast or moved after it was patched: the adapters that were not in it at that time follow when they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels

from ..models import TRAINABLE_START, tiny_batch, tiny_bert, tiny_llama


def two(build: Any, **settings: Any) -> Any:
    torch.manual_seed(5)
    model = meft_kernels.patch(build(), fraction_bits=14, **{**TRAINABLE_START, **settings})
    meft_kernels.add_adapter(model, "b", rank=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".meft." not in name:
                parameter.add_(0.01)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model)).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_one_that_comes_back_computes_as_if_cast_alone(build: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = two(build)
    meft_kernels.save_adapter(model, tmp_path, adapter_name="b")
    alone = logits(meft_kernels.load_adapter(build(), tmp_path).to(dtype))
    first = logits(model.to(dtype))
    meft_kernels.set_adapter(model, "b")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(model), alone)
    meft_kernels.set_adapter(model, "default")
    assert torch.equal(logits(model), first)


def test_a_cast_that_was_undone_meanwhile_rounds_nothing() -> None:
    model = two(tiny_bert)
    meft_kernels.set_adapter(model, "b")
    expected = logits(model)
    meft_kernels.set_adapter(model, "default")
    model.bfloat16().float()
    meft_kernels.set_adapter(model, "b")
    adapters = {p.dtype for name, p in model.named_parameters() if ".meft." in name}
    assert adapters == {torch.float32}
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()  # the backbone's weights were rounded


@pytest.mark.parametrize("adapter_dtype", ["float32", "model"])
def test_without_a_cast_each_keeps_the_dtype_that_it_was_made_in(adapter_dtype: str) -> None:
    model = meft_kernels.patch(tiny_llama().bfloat16(), adapter_dtype=adapter_dtype, fraction_bits=14)
    other = "model" if adapter_dtype == "float32" else "float32"
    meft_kernels.add_adapter(model, "b", adapter_dtype=other)
    for name, kind in (("b", other), ("default", adapter_dtype), ("b", other)):
        meft_kernels.set_adapter(model, name)
        expected = torch.float32 if kind == "float32" else torch.bfloat16
        assert {p.dtype for key, p in model.named_parameters() if ".meft." in key} == {expected}


def test_an_optimizer_still_holds_what_was_cast() -> None:
    model = two(tiny_bert).train()
    meft_kernels.set_adapter(model, "b")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    meft_kernels.set_adapter(model, "default")
    model.double()
    meft_kernels.set_adapter(model, "b")
    before = logits(model.eval())
    model.train()(**tiny_batch(model)).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model.eval()), before)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_tied_weights_stay_tied_and_each_adapter_has_its_own() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    meft_kernels.patch(model, fraction_bits=18, modules_to_save=("model.embed_tokens",), **TRAINABLE_START)
    meft_kernels.add_adapter(model, "b")
    first = logits(model)
    meft_kernels.set_adapter(model, "b")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    second = logits(model)
    meft_kernels.set_adapter(model, "default")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), first)
    meft_kernels.set_adapter(model, "b")
    assert torch.equal(logits(model), second)
