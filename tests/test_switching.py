"""Several adapters for one model: each computes, trains and is saved as if it were alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels import PatchError, ReversibleUsageError
from meft_kernels.notices import warn_once
from meft_kernels.patching.state import fraction_bits_of, require_state

from .models import TRAINABLE_START, VARIANTS, tiny_batch, tiny_bert, tiny_llama


def logits(model: Any, **batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**(batch or tiny_batch(model))).logits


def two_adapters(build: Callable[[], Any] = tiny_bert, **settings: Any) -> Any:
    """``default`` and ``other`` (rank 3), both with weights of their own; ``default`` is active."""
    model = meft_kernels.patch(build(), **{**TRAINABLE_START, **settings})
    torch.manual_seed(11)
    meft_kernels.add_adapter(model, "other", rank=3, dropout=0.0)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_each_computes_as_if_alone(build: Callable[[], Any], variant: str, tmp_path: Path) -> None:
    model = two_adapters(build, variant=variant)
    first = logits(model)
    meft_kernels.set_adapter(model, "other")
    assert meft_kernels.adapter_names(model) == ("other", "default")
    second = logits(model)
    assert not torch.equal(first, second)
    meft_kernels.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    for name, expected in (("default", first), ("other", second)):
        meft_kernels.save_adapter(model, tmp_path / name, adapter_name=name)
        alone = meft_kernels.load_adapter(build(), tmp_path / name)
        assert torch.equal(logits(alone), expected)
    assert meft_kernels.adapter_names(model) == ("default", "other")
    both = meft_kernels.load_adapter(build(), tmp_path / "default", adapter_name="a")
    meft_kernels.load_adapter(both, tmp_path / "other", adapter_name="b")
    assert meft_kernels.adapter_names(both) == ("a", "b")
    assert torch.equal(logits(both), first)
    meft_kernels.set_adapter(both, "b")
    assert torch.equal(logits(both), second)
    meft_kernels.load_adapter(both, tmp_path / "other", adapter_name="b")  # once more, into one that is there


def test_training_one_leaves_the_other_alone() -> None:
    model = two_adapters()
    first = logits(model)
    meft_kernels.set_adapter(model, "other")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = logits(model)
    model.train()(**tiny_batch(model)).loss.backward()
    optimizer.step()
    model.eval()
    second = logits(model)
    assert not torch.equal(before, second)
    waiting = require_state(model).inactive["default"].heads["classifier.weight"]
    assert not torch.equal(model.classifier.weight, waiting)
    meft_kernels.set_adapter(model, "default")
    assert torch.equal(logits(model), first)  # the head as well: each has its own
    meft_kernels.set_adapter(model, "other")
    assert torch.equal(logits(model), second)
    # The optimizer still holds the parameters that are in the model now.
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_switch_between_forward_and_backward() -> None:
    model = two_adapters().train()
    loss = model(**tiny_batch(model)).loss
    meft_kernels.set_adapter(model, "other")
    with pytest.raises(ReversibleUsageError, match="another adapter switched on or off"):
        loss.backward()
    meft_kernels.set_adapter(model, "default")
    loss = model(**tiny_batch(model)).loss
    meft_kernels.set_adapter(model, "other")
    meft_kernels.set_adapter(model, "default")
    loss.backward()  # nothing changed
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_calibration_belongs_to_the_adapter() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=14, inference="exact", **TRAINABLE_START)
    meft_kernels.add_adapter(model, "finer", fraction_bits=20)
    assert fraction_bits_of(require_state(model)) == (14,)
    meft_kernels.set_adapter(model, "finer")
    assert fraction_bits_of(require_state(model)) == (20,)
    meft_kernels.add_adapter(model, "calibrated", fraction_bits=None)
    meft_kernels.set_adapter(model, "calibrated")
    assert fraction_bits_of(require_state(model)) == (None,)
    logits(model)
    assert fraction_bits_of(require_state(model)) != (None,)
    meft_kernels.set_adapter(model, "default")
    assert fraction_bits_of(require_state(model)) == (14,)


def test_modes_and_moves_reach_those_that_come_back() -> None:
    model = two_adapters(dropout=0.5).train()
    meft_kernels.set_adapter(model, "other")
    model.eval()
    meft_kernels.set_adapter(model, "default")
    assert not any(module.training for module in model.modules())
    meft_kernels.set_adapter(model, "other")
    model.to("meta")
    meft_kernels.set_adapter(model, "default")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_copies_keep_all() -> None:
    model = two_adapters()
    twin = copy.deepcopy(model)
    meft_kernels.set_adapter(twin, "other")
    assert require_state(model).active == "default"
    second = logits(twin)
    meft_kernels.set_adapter(model, "other")
    assert torch.equal(logits(model), second)
    with torch.no_grad():
        model.bert.encoder.layer[0].meft["ffn"].up.weight.add_(1)
    assert torch.equal(logits(twin), second)


def test_disabled_and_unpatched() -> None:
    plain = tiny_llama()
    batch = tiny_batch(plain)
    expected = logits(plain, **batch)
    model = two_adapters(tiny_llama)
    meft_kernels.set_adapter(model, "other")
    with meft_kernels.disable_adapter(model):
        assert torch.equal(logits(model, **batch), expected)
    meft_kernels.unpatch(model)
    assert torch.equal(logits(model, **batch), expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert "save_pretrained" not in vars(model)


def test_a_disabled_adapter_whose_norms_train_is_not_the_pretrained_model(caplog: pytest.LogCaptureFixture) -> None:
    model = meft_kernels.patch(tiny_bert(), **TRAINABLE_START)  # with a head that trains, which is what a head is for
    warn_once.cache_clear()
    with meft_kernels.disable_adapter(model):
        assert not caplog.records
    model.bert.encoder.layer[1].output.LayerNorm.requires_grad_(True)
    with meft_kernels.disable_adapter(model):
        assert "bert.encoder.layer.1.output.LayerNorm.weight among 2 parameters" in caplog.text


def test_deleted() -> None:
    model = two_adapters()
    with pytest.raises(PatchError, match="'default' is the active adapter"):
        meft_kernels.delete_adapter(model, "default")
    meft_kernels.delete_adapter(model, "other")
    assert meft_kernels.adapter_names(model) == ("default",)
    with pytest.raises(PatchError, match="no adapter 'other'; the model has 'default'"):
        meft_kernels.set_adapter(model, "other")
    with pytest.raises(PatchError, match="no adapter 'other'"):
        meft_kernels.delete_adapter(model, "other")


def test_refusals(tmp_path: Path) -> None:
    model = two_adapters()
    with pytest.raises(PatchError, match="an adapter 'other' already; the model has 'default', 'other'"):
        meft_kernels.add_adapter(model, "other")
    with pytest.raises(ValueError, match="string that is not empty"):
        meft_kernels.add_adapter(model, "")
    with pytest.raises(PatchError, match="variant cannot differ"):
        meft_kernels.add_adapter(model, "x", variant="meft1")
    with pytest.raises(ValueError, match="rank must be"):
        meft_kernels.add_adapter(model, "x", rank=0)
    with pytest.raises(ValueError, match="activation 'wavy'"):
        meft_kernels.add_adapter(model, "x", activation="wavy")
    assert meft_kernels.adapter_names(model) == ("default", "other")
    for call in (meft_kernels.adapter_names, lambda model: meft_kernels.set_adapter(model, "x")):
        with pytest.raises(PatchError, match="not patched"):
            call(tiny_bert())
    with pytest.raises(PatchError, match="adapters='none'"):
        meft_kernels.add_adapter(meft_kernels.patch(tiny_bert(), adapters="none"), "x")
    meft_kernels.save_adapter(meft_kernels.patch(tiny_bert(), variant="meft1"), tmp_path)
    with pytest.raises(PatchError, match="variant='meft2'"):
        meft_kernels.load_adapter(model, tmp_path, adapter_name="x")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    meft_kernels.save_adapter(two_adapters(), tmp_path / "good")
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(meft_kernels.AdapterFileError, match="damaged"):
        meft_kernels.load_adapter(model, tmp_path / "good", adapter_name="x")
    assert meft_kernels.adapter_names(model) == ("default", "other")


def test_describe_names_them() -> None:
    assert "default (rank 8), other" in str(meft_kernels.describe(two_adapters(rank=8)))
