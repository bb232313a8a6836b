"""Composites: classes of the user's own around a pretrained model, or from it, with parts that are new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, LlamaForCausalLM

import meft_kernels
from meft_kernels.patching.state import require_state

from ..injection import difference, everything, same
from ..models import TRAINABLE_START, tiny_bert, tiny_llama, worst_error

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 3, 4, 5]])


def config() -> BertConfig:
    settings: BertConfig = tiny_bert(2, 32).config
    return settings


class Around(nn.Module):
    """Carries its backbone's config, as many wrappers do for a Trainer's sake."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bert = BertModel(config())
        self.config = self.bert.config
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.bert(input_ids).pooler_output)


class Weighted(BertPreTrainedModel):
    """A head, a parameter that is in no module, and a pretrained teacher that stays as it is."""

    def __init__(self, settings: BertConfig) -> None:
        super().__init__(settings)
        torch.manual_seed(0)
        self.bert = BertModel(settings)
        self.head = nn.Sequential(nn.Linear(32, 3), nn.BatchNorm1d(3))
        self.log_var = nn.Parameter(torch.zeros(3))
        self.teacher = nn.Linear(32, 3).requires_grad_(False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        pooled = self.bert(input_ids).pooler_output
        return (self.head(pooled) - self.teacher(pooled)) * self.log_var.exp() + self.log_var


class Renamed(Weighted):
    """The backbone under a name that transformers would not look for."""

    def __init__(self, settings: BertConfig) -> None:
        super().__init__(settings)
        del self.bert
        torch.manual_seed(0)
        self.encoder = BertModel(settings)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        pooled = self.encoder(input_ids).pooler_output
        return self.head(pooled) * self.log_var.exp() + self.log_var


class Valued(LlamaForCausalLM):
    """A language model, whose head is pretrained, with a head of values beside it, which is not."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        torch.manual_seed(0)
        self.value = nn.Linear(settings.hidden_size, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.value(self.model(input_ids).last_hidden_state[:, -1]) * self.scale


def patched(model: nn.Module, **settings: Any) -> Any:
    torch.manual_seed(5)
    return meft_kernels.patch(model, fraction_bits=18, **{**TRAINABLE_START, **settings}).train()


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    model(IDS).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def new_parts(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and ".meft." not in name}


def test_a_wrapper_is_refused_by_name_and_its_part_patched() -> None:
    model = Around()
    before = everything(model)
    with pytest.raises(meft_kernels.UnsupportedModelError, match=r"patch the one inside it, patch\(model\.bert\)"):
        meft_kernels.patch(model)
    now = everything(model)
    assert same(now, before), difference(now, before)
    results = []
    for engine in ("reversible", "autograd"):
        model = Around().train()
        patched(model.bert, engine=engine)
        assert {"head.weight", "head.bias"} <= new_parts(model)
        results.append(gradients_of(model))
    assert worst_error(results[0], results[1], floor=1e-3) < 1e-5
    with pytest.raises(meft_kernels.PatchError, match="its part bert is: give that one"):
        meft_kernels.save_adapter(model, "nowhere")


def test_a_cross_encoder(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from meft_kernels.pretrained import find_pretrained

    tokenizer = find_pretrained("minilm").tokenizer
    tiny_bert(2, 32, vocab_size=len(tokenizer), num_labels=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [("a question", "its answer"), ("another", "no answer at all")]
    expected = torch.tensor(model.predict(pairs))
    assert meft_kernels.patch(model, beta=-(2.0**-12)) is model
    assert new_parts(model) == {
        f"0.model.{name}.{kind}" for name in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")
    }
    assert torch.allclose(torch.tensor(model.predict(pairs)), expected, atol=1e-3)


HEAD = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias", "log_var"}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: Weighted(config()), HEAD | {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}),
        (lambda: Renamed(config()), HEAD | {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}),
        (lambda: Valued(tiny_llama(2, 32).config), {"value.weight", "value.bias", "scale"}),
    ],
    ids=["weighted", "renamed", "valued"],
)
def test_what_a_class_adds_trains_and_is_saved(build: Any, expected: set[str], tmp_path: Path) -> None:
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(build(), engine=engine)
        assert new_parts(model) == expected
        results.append(gradients_of(model))
    assert worst_error(results[0], results[1], floor=1e-3) < 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        first = model.eval()(IDS)
        meft_kernels.save_adapter(model, tmp_path)
        assert torch.equal(meft_kernels.load_adapter(build().eval(), tmp_path)(IDS), first)
        # Each adapter has its own, and they come back.
        meft_kernels.add_adapter(model, "b")
        meft_kernels.set_adapter(model, "b")
        for name in expected:
            model.get_parameter(name).add_(1)
        assert not torch.equal(model(IDS), first)
        meft_kernels.set_adapter(model, "default")
        assert torch.equal(model(IDS), first)


def test_a_parameter_is_named_in_modules_to_save(tmp_path: Path) -> None:
    model = patched(Weighted(config()), modules_to_save=("log_var",))
    assert new_parts(model) == {"log_var"}
    assert require_state(model).trained_modules == ("log_var",)
    with torch.no_grad():
        model.log_var.add_(1)
    meft_kernels.save_adapter(model, tmp_path)
    assert torch.equal(meft_kernels.load_adapter(Weighted(config()), tmp_path).log_var, model.log_var)


def test_all_frozen_before_patch_says_nothing_about_what_is_new() -> None:
    assert new_parts(patched(Weighted(config()).requires_grad_(False))) >= HEAD


class Demanding(LlamaForCausalLM):
    """Its transformers class cannot be built from the config alone, so that nobody knows what it adds."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.value = nn.Linear(settings.hidden_size, 1)


def test_what_cannot_be_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Demanding(tiny_llama(2, 32).config)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda self, settings: 1 / 0)
    before = everything(model)
    with pytest.raises(meft_kernels.UnsupportedModelError, match=r"what Demanding adds .* name it in modules_to_save"):
        meft_kernels.patch(model)
    assert same(everything(model), before)
    assert new_parts(meft_kernels.patch(model, modules_to_save=("value",))) == {"value.weight", "value.bias"}
