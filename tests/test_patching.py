"""patch, unpatch, describe, and what they leave behind."""

from __future__ import annotations

import dataclasses
import gc
import logging
import pickle
import re
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

import meft_kernels
from meft_kernels.architectures import find_architecture
from meft_kernels.patching.state import require_state, unwrap
from meft_kernels.reports.describe import describe

from .architectures.zoo import tiny
from .models import FAMILIES, TRAINABLE_START, VARIANTS, tiny_batch, tiny_bert, tiny_llama, train_step

HEADS = [
    BertModel, BertForPreTraining, BertLMHeadModel, BertForMaskedLM, BertForNextSentencePrediction,
    BertForSequenceClassification, BertForMultipleChoice, BertForTokenClassification, BertForQuestionAnswering,
    LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForQuestionAnswering,
    LlamaForTokenClassification,
]  # fmt: skip
# What of each model trains besides the adapters: heads that pretraining did not make.
NEW_HEADS = {
    BertForSequenceClassification: {"classifier"},
    BertForMultipleChoice: {"classifier"},
    BertForTokenClassification: {"classifier"},
    BertForQuestionAnswering: {"qa_outputs"},
    BertForNextSentencePrediction: {"cls"},
    LlamaForSequenceClassification: {"score"},
    LlamaForQuestionAnswering: {"qa_outputs"},
    LlamaForTokenClassification: {"score"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_every_task_head(head: type[nn.Module], variant: str) -> None:
    config: Any = tiny_llama().config if head.__name__.startswith("Llama") else BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    torch.manual_seed(0)
    model = meft_kernels.patch(head(config), variant=variant, **TRAINABLE_START)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".meft." not in name]
    assert {name.split(".")[0] for name in trained if not name.startswith("bert.")} == NEW_HEADS.get(head, set())
    pooled = {BertForSequenceClassification, BertForMultipleChoice, BertForNextSentencePrediction}
    assert any(name.startswith("bert.pooler.") for name in trained) == (head in pooled)
    assert all(name.startswith("bert.pooler.") for name in trained if name.startswith("bert."))
    ids = torch.randint(1, 97, (2, 3, 5) if head is BertForMultipleChoice else (2, 5))
    output = model.train()(input_ids=ids)
    sum(value.float().square().mean() for value in output.to_tuple() if isinstance(value, torch.Tensor)).backward()
    adapters = [p for name, p in model.named_parameters() if ".meft." in name]
    assert adapters
    assert all(p.grad is not None for p in adapters)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_leaves_nothing(family: str, variant: str) -> None:
    model = FAMILIES[family]()
    next(model.parameters()).requires_grad_(False)  # a user's own choice comes back too
    batch = tiny_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
    keys = list(model.state_dict())
    required = [p.requires_grad for p in model.parameters()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    meft_kernels.patch(model, variant=variant, **TRAINABLE_START)
    if family == "llama":  # no head of its own to be trained
        train_step(model.train(), batch)
    model.eval()
    assert meft_kernels.unpatch(model) is model
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == required
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ] == hooks


def test_a_forward_bound_by_others_survives() -> None:
    model = tiny_llama()
    layer = model.model.layers[0]
    original, calls = layer.forward, []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = counted
    meft_kernels.patch(model, fraction_bits=16, **TRAINABLE_START).train()
    model(**tiny_batch(model)).loss.backward()
    assert len(calls) == 2  # forward and recompute
    meft_kernels.unpatch(model)
    assert layer.forward is counted


def test_one_line_is_logged_and_nothing_printed(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="meft_kernels"):
        meft_kernels.patch(tiny_bert())
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "meft2, exact arithmetic, centered coupling, 3 reversible layers" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = meft_kernels.patch(tiny_llama(), rank=4)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 3 * 2 * (64 * 4 + 4 + 4 * 64 + 64)
    total = sum(p.numel() for p in model.parameters())
    meft_kernels.print_trainable_parameters(model)
    expected = (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
    )
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({}, 8),
        ({"variant": "meft3"}, 12),
        ({"beta": -0.125}, 3),
        ({"beta": 0.1}, 4),
        ({"beta": 1.0}, 0),
        ({"arithmetic": "float"}, 0),
    ],
)
def test_describe(settings: dict[str, Any], bits: int) -> None:
    model = meft_kernels.patch(tiny_llama(), **settings)
    description = describe(model)
    (stack,) = description.stacks
    assert (stack.layers, stack.reversible_layers, stack.bits_per_element) == (3, 3, bits)
    assert stack.bytes_per_token_and_layer == 64 * bits / 8
    assert stack.bytes_per_token == 3 * 64 * bits / 8 + 2 * 64 * 4
    assert description.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = str(description)
    assert all(word in text for word in ("LlamaForCausalLM", description.variant, "model.layers", "bytes per token"))


@pytest.mark.parametrize(
    ("name", "readout"), [("llama", (257 / 256, -1 / 256)), ("bert", (1.0, 0.0)), ("opt-post-norm", (1.0, 0.0))]
)
def test_readout_follows_the_place_of_the_norms(name: str, readout: tuple[float, float]) -> None:
    """In a residual stream what the next leak would have added comes along; where layers end in a norm it would err."""
    (stack,) = require_state(meft_kernels.patch(tiny(name))).stacks
    assert stack.plan.readout == readout
    (stack,) = require_state(meft_kernels.patch(tiny(name), variant="meft1")).stacks
    assert stack.plan.readout == (-1 / 256, 257 / 256)


def test_describe_names_the_layers_that_keep_everything() -> None:
    """Fewer reversible layers keep fewer remainders, and more of all else."""
    text = str(describe(meft_kernels.patch(tiny_llama(), reversible_layers=1, frozen_layers=1)))
    assert "the two streams included, and all activations of 1 layers" in text
    assert "activations" not in str(describe(meft_kernels.patch(tiny_llama(), frozen_layers=1)))


def test_adapters_are_float32_beside_a_bfloat16_model() -> None:
    model = meft_kernels.patch(tiny_llama().bfloat16())
    assert {p.dtype for name, p in model.named_parameters() if ".meft." in name} == {torch.float32}
    narrow = meft_kernels.patch(tiny_llama().bfloat16(), adapter_dtype="model")
    assert {p.dtype for name, p in narrow.named_parameters() if ".meft." in name} == {torch.bfloat16}


def test_pickled_model() -> None:
    model = meft_kernels.patch(tiny_bert(), **TRAINABLE_START)
    batch = tiny_batch(model)
    logits = model(**batch).logits
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**batch).logits, logits)
    meft_kernels.unpatch(again)
    assert require_state(model)


def test_wrappers_are_looked_through() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert unwrap(model) is model.base_model.model
    assert meft_kernels.patch(model, adapters="none") is model
    assert meft_kernels.unpatch(model) is model


def test_memory_goes_with_the_model() -> None:
    gc.disable()  # reference cycles would only go with the collector
    try:
        model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
        train_step(model, tiny_batch(model))
        meft_kernels.unpatch(model)
        weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_modules_to_save_beside_a_lora() -> None:
    model = tiny_bert().requires_grad_(False)
    meft_kernels.patch(model, adapters="none", modules_to_save=("classifier",))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_adapters_none_leaves_trainability_alone() -> None:
    model = tiny_llama()
    meft_kernels.patch(model, adapters="none")
    assert all(p.requires_grad for p in model.parameters())
    added = [name for name in model.state_dict() if ".meft." in name]
    assert added == ["model.layers.0.meft.state._extra_state"]  # the calibration


def test_a_family_can_be_registered_from_outside() -> None:
    from meft_kernels.architectures import registry

    llama = find_architecture("llama")
    assert llama is not None
    spec = dataclasses.replace(llama, model_types=("llama-of-mine",))
    try:
        meft_kernels.register_architecture(spec)
        assert "llama-of-mine" in meft_kernels.supported_model_types()
        model = tiny_llama()
        model.config.model_type = "llama-of-mine"
        meft_kernels.patch(model)
    finally:
        registry._SPECS.pop("llama-of-mine")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("r", "'r': the width of the adapters is rank. To train a LoRA, put it into the model with PEFT and call"),
        ("lora_alpha", "'lora_alpha': these adapters have a rank and no scale"),
        ("ranks", "'ranks': did you mean rank?"),
    ],
)
def test_names_of_a_lora_are_explained(name: str, said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"there is no setting {said}")):
        meft_kernels.patch(tiny_bert(), **{name: 16})


def test_an_optimizer_built_before_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """It holds what is frozen now, and its steps would change nothing."""
    model = tiny_llama()
    early = torch.optim.AdamW(model.parameters())
    meft_kernels.patch(model, rank=4)
    assert "an optimizer that was built before patch holds parameters of this model" in caplog.text
    caplog.clear()
    meft_kernels.unpatch(model)
    del early
    parameters = list(model.parameters())  # held, but by no optimizer
    meft_kernels.patch(model, rank=4)
    late = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    meft_kernels.unpatch(model)
    other = torch.optim.AdamW(tiny_llama().parameters())
    meft_kernels.patch(model, rank=4)
    plain = tiny_llama()
    whole = torch.optim.AdamW(plain.parameters())
    meft_kernels.patch(plain, adapters="none")  # what trained before trains now
    assert "optimizer" not in caplog.text and parameters and late and other and whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_trains_in_float16_is_told_of(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = meft_kernels.patch(tiny_bert().to(dtype), modules_to_save=("classifier",))
    assert ("classifier.weight and 1 others train in float16" in caplog.text) == (dtype == torch.float16)
    caplog.clear()
    meft_kernels.patch(tiny_llama().to(dtype))  # float32 adapters, and nothing else
    assert "train in float16" not in caplog.text and model
