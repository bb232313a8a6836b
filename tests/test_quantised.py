"""Quantised backbones: frozen and only called, so that they train like others. Skipped where a package is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import meft_kernels

from .models import TRAINABLE_START, VARIANTS, StreamWitness, tiny_batch, tiny_llama, train_step, worst_error

FP32_BOUND = 1e-5


def config_for(kind: str) -> Any:
    """What from_pretrained takes; skips the test where the package that quantises is not installed."""
    import transformers

    package = "torchao" if kind == "torchao-int8" else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bitsandbytes-8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(params=["bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int8"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    config = config_for(request.param)
    tiny_llama().save_pretrained(tmp_path / "base")

    def make() -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        assert model.is_quantized
        return model

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_and_rebuilt_inputs(load: Any, variant: str) -> None:
    found = []
    for engine in ("reversible", "autograd"):
        model = load()
        torch.manual_seed(5)
        meft_kernels.patch(model, variant=variant, engine=engine, fraction_bits=20, **TRAINABLE_START).train()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        witness = StreamWitness(model)
        found.append(train_step(model, tiny_batch(model)))
        if engine == "reversible":
            witness.assert_exact(3)
    (loss, gradients), (expected_loss, expected) = found
    assert loss == expected_loss
    assert worst_error(gradients, expected) <= FP32_BOUND


def test_adapters_fit_the_quantised_model_and_the_whole_one(load: Any, tmp_path: Path) -> None:
    model = meft_kernels.patch(load(), **TRAINABLE_START)
    batch = tiny_batch(model)
    with torch.no_grad():
        logits = model(**batch).logits
    meft_kernels.save_adapter(model, tmp_path / "quantised")
    again = meft_kernels.load_adapter(load(), tmp_path / "quantised")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, logits)
    whole = meft_kernels.load_adapter(tiny_llama(), tmp_path / "quantised")
    meft_kernels.save_adapter(whole, tmp_path / "whole")
    meft_kernels.load_adapter(load(), tmp_path / "whole")
    meft_kernels.unpatch(model)
    assert not model._hf_peft_config_loaded


def test_trainer_takes_it(load: Any, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_steps=3,
    )
    model = load()
    rows = [{name: value[0] for name, value in tiny_batch(model).items()}] * 8
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load(), arguments, train_dataset=rows)
    trainer = Trainer(meft_kernels.patch(model, **TRAINABLE_START), arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors").exists()
