"""Norms and biases made trainable after ``patch``: trained, saved, loaded, resumed and switched with the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import meft_kernels
from meft_kernels import AdapterFileError, PatchError

from ..models import TRAINABLE_START, relative_error, tiny_batch, tiny_bert, tiny_llama, train_step

MODELS: dict[str, Callable[[], Any]] = {"llama": lambda: tiny_llama(2, 32), "bert": lambda: tiny_bert(2, 32)}


def unfreeze(model: Any) -> Any:
    """Norms and biases, inside of the layers and above them."""
    for name, parameter in model.named_parameters():
        if ".meft." not in name and ("norm" in name.lower() or name.endswith("bias")):
            parameter.requires_grad_(True)
    return model


def patched(build: Callable[[], Any], **settings: Any) -> Any:
    return unfreeze(meft_kernels.patch(build(), **{**TRAINABLE_START, **settings}))


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def step(model: Any, seed: int = 1) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(**tiny_batch(model, seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_batch(model)).logits


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    model = patched(MODELS[kind])
    oracle = patched(MODELS[kind], engine="autograd")
    oracle.load_state_dict(model.state_dict())
    batch = tiny_batch(model)
    assert relative_error(train_step(model.eval(), batch)[1], train_step(oracle.eval(), batch)[1]) < 1e-5
    step(model)
    meft_kernels.save_adapter(model, tmp_path / "one")
    fresh = meft_kernels.load_adapter(MODELS[kind](), tmp_path / "one")
    assert torch.equal(logits(fresh), logits(model))
    assert_equal(trainable(fresh), trainable(model))
    again = patched(MODELS[kind])
    meft_kernels.load_adapter(again, tmp_path / "one")
    assert_equal(trainable(again), trainable(model))
    # What was trained and frozen again is kept, too: it is in the folder that it came from.
    for parameter in again.parameters():
        parameter.requires_grad_(False)
    meft_kernels.save_adapter(again, tmp_path / "two")
    assert torch.equal(logits(meft_kernels.load_adapter(MODELS[kind](), tmp_path / "two")), logits(model))


class Worse(TrainerCallback):
    """Spoils the weights after the first evaluation."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(1.1)
                model.classifier.bias[0] += 10


def trainer_for(model: Any, folder: Path, steps: int, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    batch = tiny_batch(model, rows=8)
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(8)]
    settings: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 7,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**settings, **arguments})  # type: ignore[assignment]
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))


@pytest.mark.parametrize("kind", MODELS)
def test_resumed_training_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole = trainer_for(patched(MODELS[kind], dropout=0.1), tmp_path / "whole", 6)
    whole.train()
    trainer_for(patched(MODELS[kind], dropout=0.1), tmp_path / "parts", 4).train()
    resumed = trainer_for(patched(MODELS[kind], dropout=0.1), tmp_path / "parts", 6)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(trainable(resumed.model), trainable(whole.model))
    assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]
    # A checkpoint is a folder for load_adapter.
    fresh = meft_kernels.load_adapter(MODELS[kind](), tmp_path / "parts" / "checkpoint-6")
    assert torch.equal(logits(fresh), logits(whole.model))


def test_the_best_checkpoint_is_taken_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_for(patched(MODELS["bert"], fraction_bits=14), tmp_path, 6, Worse(), **arguments)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    held = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    trained = trainable(trainer.model)
    assert trained.keys() == {name for name in held if not name.endswith("_extra_state")}
    assert all(torch.equal(tensor, held[name]) for name, tensor in trained.items())
    assert "missing keys" not in caplog.text


def test_each_adapter_has_its_own(tmp_path: Path) -> None:
    model = patched(MODELS["llama"])
    meft_kernels.add_adapter(model, "b")
    before = logits(model)
    meft_kernels.set_adapter(model, "b")
    step(model)
    after = logits(model)
    assert not torch.equal(before, after)
    meft_kernels.set_adapter(model, "default")
    assert torch.equal(logits(model), before)
    meft_kernels.set_adapter(model, "b")
    assert torch.equal(logits(model), after)
    for name, expected in (("default", before), ("b", after)):
        meft_kernels.save_adapter(model, tmp_path / name, adapter_name=name)
        assert torch.equal(logits(meft_kernels.load_adapter(MODELS["llama"](), tmp_path / name)), expected)


def test_one_with_and_one_without(tmp_path: Path) -> None:
    """An adapter that comes with norms of its own leaves the other the pretrained ones."""
    with_norms = patched(MODELS["llama"])
    step(with_norms)
    meft_kernels.save_adapter(with_norms, tmp_path / "norms")
    model = meft_kernels.patch(MODELS["llama"](), **TRAINABLE_START)
    expected = logits(model)
    meft_kernels.load_adapter(model, tmp_path / "norms", "norms")
    assert torch.equal(logits(model), expected)
    assert all(".meft." in name for name in trainable(model))
    meft_kernels.set_adapter(model, "norms")
    assert torch.equal(logits(model), logits(with_norms))
    assert_equal(trainable(model), trainable(with_norms))
    meft_kernels.set_adapter(model, "default")
    assert torch.equal(logits(model), expected)
    meft_kernels.save_adapter(model, tmp_path / "default")
    assert torch.equal(logits(meft_kernels.load_adapter(MODELS["llama"](), tmp_path / "default")), expected)


def test_unfrozen_among_several_adapters(tmp_path: Path) -> None:
    model = meft_kernels.patch(MODELS["llama"](), **TRAINABLE_START)
    meft_kernels.add_adapter(model, "b")
    model.model.norm.weight.requires_grad_(True)
    message = r"1 parameters, model\.norm\.weight among them.*before add_adapter"
    calls: tuple[Callable[[], Any], ...] = (
        lambda: meft_kernels.set_adapter(model, "b"),
        lambda: meft_kernels.add_adapter(model, "c"),
        lambda: meft_kernels.save_adapter(model, tmp_path, adapter_name="b"),
    )
    for call in calls:
        with pytest.raises(PatchError, match=message):
            call()
        assert meft_kernels.adapter_names(model) == ("default", "b")
    meft_kernels.save_adapter(model, tmp_path)
    assert "model.norm.weight" in load_file(tmp_path / "adapter_model.safetensors")
    model.model.norm.weight.requires_grad_(False)
    meft_kernels.set_adapter(model, "b")


def test_a_folder_that_lacks_what_trains_here(tmp_path: Path) -> None:
    meft_kernels.save_adapter(meft_kernels.patch(MODELS["llama"](), **TRAINABLE_START), tmp_path)
    model = patched(MODELS["llama"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"lacks 5 tensors that train here, model\.layers\.0\.input_layernorm"):
        meft_kernels.load_adapter(model, tmp_path)
    assert_equal(model.state_dict(), before)


def test_norms_beside_a_lora_are_pefts_to_save(tmp_path: Path) -> None:
    import peft

    def lora(engine: str) -> Any:
        torch.manual_seed(3)
        names = ["input_layernorm", "norm"]
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=names, init_lora_weights=False)
        model = peft.get_peft_model(MODELS["llama"](), config)
        return meft_kernels.patch(model, adapters="none", engine=engine, fraction_bits=18)

    model, oracle = lora("reversible"), lora("autograd")
    batch = tiny_batch(MODELS["llama"]())
    gradients = train_step(model.train(), batch)[1]
    assert sum("norm.modules_to_save" in name for name in gradients) == 5
    assert relative_error(gradients, train_step(oracle.train(), batch)[1]) < 1e-5
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(MODELS["llama"](), tmp_path)
    meft_kernels.patch(again, adapters="none", fraction_bits=18)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
