"""An embedding that trains and is the head's weight as well: one tensor in training, switching, saving and resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import meft_kernels
from meft_kernels import AdapterFileError
from meft_kernels.patching.state import find_state

from ..models import TRAINABLE_START, relative_error, tiny_batch, tiny_llama, train_step


def base(tied: bool = True) -> Any:
    return tiny_llama(2, 32, tie_word_embeddings=tied)


def by_setting(name: str) -> Callable[..., Any]:
    return lambda **settings: meft_kernels.patch(base(), **TRAINABLE_START, modules_to_save=(name,), **settings)


def by_unfreezing(**settings: Any) -> Any:
    model = meft_kernels.patch(base(), **TRAINABLE_START, **settings)
    model.lm_head.requires_grad_(True)
    return model


WAYS: dict[str, Callable[..., Any]] = {
    "embeddings": by_setting("model.embed_tokens"),
    "head": by_setting("lm_head"),
    "unfrozen": by_unfreezing,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


def step(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(**tiny_batch(model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@ways
def test_trained_and_saved(way: Callable[..., Any], tmp_path: Path) -> None:
    model, oracle = way(), way(engine="autograd")
    oracle.load_state_dict(model.state_dict())
    batch = tiny_batch(model)
    assert relative_error(train_step(model, batch)[1], train_step(oracle, batch)[1]) < 1e-5
    step(model)
    meft_kernels.save_adapter(model, tmp_path)
    keys = [key for key in load_file(tmp_path / "adapter_model.safetensors") if ".meft." not in key]
    assert len(keys) == 1
    again = meft_kernels.load_adapter(base(), tmp_path)
    assert is_tied(again)
    assert torch.equal(logits(again), logits(model))


@ways
def test_each_adapter_has_its_own(way: Callable[..., Any], tmp_path: Path) -> None:
    model = way()
    meft_kernels.add_adapter(model, "b")
    first = logits(model)
    meft_kernels.set_adapter(model, "b")
    assert is_tied(model)
    step(model)
    second = logits(model)
    assert not torch.equal(first, second)
    meft_kernels.set_adapter(model, "default")
    assert is_tied(model)
    assert torch.equal(logits(model), first)
    twin = copy.deepcopy(model)
    meft_kernels.set_adapter(twin, "b")
    assert is_tied(twin)
    assert torch.equal(logits(twin), second)
    for name, expected in (("default", first), ("b", second)):
        meft_kernels.save_adapter(model, tmp_path / name, adapter_name=name)
        alone = meft_kernels.load_adapter(base(), tmp_path / name)
        assert torch.equal(logits(alone), expected)
    model.lm_head.requires_grad_(True)
    meft_kernels.unpatch(model)
    assert is_tied(model)


@ways
def test_resumed(way: Callable[..., Any], tmp_path: Path) -> None:
    model = way()
    step(model)
    model.save_pretrained(tmp_path)
    other = way()
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert result.missing_keys == []
    step(model)
    step(other)
    assert is_tied(other)
    assert torch.equal(logits(other), logits(model))


@ways
def test_averaged(way: Callable[..., Any]) -> None:
    model = way()
    logits(model)
    other = copy.deepcopy(model)
    step(other)
    mine, others = model.state_dict(), other.state_dict()
    average = {name: (tensor + others[name]) / 2 for name, tensor in mine.items()}
    assert torch.equal(average["lm_head.weight"], average["model.embed_tokens.weight"])
    model.load_state_dict(average)
    assert is_tied(model)
    assert torch.equal(model.lm_head.weight, average["lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_that_is_tied_otherwise(tied: bool, tmp_path: Path) -> None:
    def build(tied: bool) -> Any:
        model = base(tied)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        return model

    model = meft_kernels.patch(build(tied), **TRAINABLE_START, modules_to_save=("model.embed_tokens",))
    step(model)
    meft_kernels.save_adapter(model, tmp_path)
    other = build(not tied)
    with pytest.raises(AdapterFileError, match="load the base model with the same tie_word_embeddings"):
        meft_kernels.load_adapter(other, tmp_path)
    assert find_state(other) is None
    assert torch.equal(logits(meft_kernels.load_adapter(build(tied), tmp_path)), logits(model))
