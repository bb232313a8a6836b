"""PEFT put on a model before ``patch``, which is the way, and after it, which is told at the first chance."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels import PatchError, ReversibleUsageError

from ..models import TRAINABLE_START, tiny_batch, tiny_llama, train_step, worst_error

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def patched(model: Any, **settings: Any) -> Any:
    torch.manual_seed(5)
    return meft_kernels.patch(model, **{**TRAINABLE_START, "fraction_bits": 18, **settings}).train()


def lora(model: Any, **settings: Any) -> Any:
    torch.manual_seed(7)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": "all-linear", **settings}))


def lively(model: Any) -> Any:
    """A fresh LoRA adds nothing, and half of its gradients are zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    return model


@pytest.mark.parametrize("adapters", ["all", "none"])
def test_before(adapters: str) -> None:
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(lively(lora(tiny_llama())), engine=engine, adapters=adapters)
        results.append(train_step(model, tiny_batch(model)))
    assert results[0][0] == results[1][0]
    assert worst_error(results[0][1], results[1][1], floor=1e-3) < 1e-5
    assert any("lora_A" in name for name in results[0][1])
    assert any(".meft." in name for name in results[0][1]) == (adapters == "all")


AFTER = {
    "get_peft_model": lora,
    "add_adapter": lambda model: model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"])) or model,
    "inject": lambda model: peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), model),
}


@pytest.mark.parametrize("way", AFTER)
def test_after_is_told_at_the_first_training_step(way: str) -> None:
    model = patched(tiny_llama())
    batch = tiny_batch(model)
    wrapped = AFTER[way](model).train()
    assert not [name for name, _ in wrapped.named_parameters() if ".meft." in name and "lora" in name]
    for _ in range(2):  # and at every other
        with pytest.raises(ReversibleUsageError, match=r"PEFT was put on this model after patch.*Wrap first and patch"):
            wrapped(**batch)
    with torch.no_grad():  # inference trains nothing that could be missed
        assert torch.isfinite(wrapped.eval()(**batch).logits).all()


def test_what_the_error_says_helps() -> None:
    expected_model = patched(lively(lora(tiny_llama())))
    batch = tiny_batch(expected_model)
    expected = train_step(expected_model, batch)
    model = patched(tiny_llama())
    wrapped = lora(model).train()
    with pytest.raises(ReversibleUsageError):
        wrapped(**batch)
    meft_kernels.unpatch(wrapped)
    again = patched(lively(lora(wrapped.unload())))
    loss, gradients = train_step(again, batch)
    assert loss == expected[0]
    assert gradients.keys() == expected[1].keys()
    assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)


def test_adapters_made_trainable_again_train_beside_it() -> None:
    """Who does that knows."""
    results = []
    for engine in ("reversible", "autograd"):
        wrapped = lively(lora(patched(tiny_llama(), engine=engine))).train()
        for name, parameter in wrapped.named_parameters():
            if ".meft." in name:
                parameter.requires_grad_(True)
        results.append(train_step(wrapped, tiny_batch(wrapped)))
    assert worst_error(results[0][1], results[1][1], floor=1e-3) < 1e-5
    assert any(".meft." in name for name in results[0][1])


def test_adapters_frozen_by_the_user_under_a_lora_raise_nothing() -> None:
    model = patched(lora(tiny_llama()))
    for name, parameter in model.named_parameters():
        if ".meft." in name:
            parameter.requires_grad_(False)
    _, gradients = train_step(model, tiny_batch(model))
    assert gradients
    assert not [name for name in gradients if ".meft." in name]


def test_a_lora_named_after_our_projections_is_refused_by_peft() -> None:
    with pytest.raises(ValueError, match="not supported"):
        lora(patched(tiny_llama()), target_modules=["down"])


def test_a_soft_prompt_after_patch_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """PEFT freezes the model under it, and leaves no other trace there."""
    from meft_kernels.notices import warn_once

    warn_once.cache_clear()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(patched(tiny_llama()), config).train()
    with caplog.at_level(logging.WARNING):
        model(**tiny_batch(model)).loss.backward()
    assert "the adapters that patch inserted have been frozen since, and do not train" in caplog.text


def test_preparation_of_a_quantised_model_after_patch() -> None:
    model = patched(tiny_llama())
    model.is_loaded_in_8bit = True  # what PEFT looks at
    with pytest.raises(
        PatchError, match=r"everything in this model was frozen.*prepare_model_for_kbit_training.*before"
    ):
        peft.prepare_model_for_kbit_training(model)
    before = tiny_llama()
    before.is_loaded_in_8bit = True
    prepared = peft.prepare_model_for_kbit_training(before, use_gradient_checkpointing=False)
    _, gradients = train_step(patched(prepared), tiny_batch(prepared))
    assert gradients


def test_preparation_of_another_model_after_patch_is_told(caplog: pytest.LogCaptureFixture) -> None:
    from meft_kernels.notices import warn_once

    warn_once.cache_clear()
    model = peft.prepare_model_for_kbit_training(patched(tiny_llama()))
    with caplog.at_level(logging.WARNING):
        model(**tiny_batch(model))
    assert "prepare_model_for_kbit_training freeze all that they find, so call them before patch" in caplog.text


def test_sft_with_peft_config(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from meft_kernels.pretrained import find_pretrained

    tokenizer = find_pretrained("minilm").tokenizer
    tokenizer.eos_token = tokenizer.sep_token
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(
        patched(tiny_llama(2, 32, vocab_size=len(tokenizer))),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": ["one text", "another"]}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
    )
    with pytest.raises(ReversibleUsageError, match="A trainer's peft_config= comes too late"):
        trainer.train()
