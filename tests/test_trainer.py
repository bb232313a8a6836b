"""transformers.Trainer on a patched model: checkpoints of the adapter alone, exact resumption, the best one taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import meft_kernels
from meft_kernels import PatchError
from meft_kernels.patching.state import fraction_bits_of, require_state

from .models import tiny_bert, tiny_llama

STEPS = 6


def examples(model: Any, rows: int = 24) -> list[dict[str, Any]]:
    """Sequences of 3 to 8 tokens with the labels that the model's head wants."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for row in range(rows):
        ids = torch.randint(3, 90, (3 + row % 6,), generator=generator).tolist()
        labels = {"labels": row % 2} if "Classification" in type(model).__name__ else {"labels": ids}
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), **labels})
    return made


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    batch = {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0)}
    whole = isinstance(rows[0]["labels"], list)
    return {**batch, "labels": padded("labels", -100) if whole else torch.tensor([row["labels"] for row in rows])}


def make(build: Callable[[], Any], **settings: Any) -> Any:
    model = build()
    torch.manual_seed(1)
    return meft_kernels.patch(model, rank=4, dropout=0.1, **settings)


def trainer_for(model: Any, folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    rows = examples(model)
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=collate,
        callbacks=list(callbacks),
    )


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama], ids=["bert", "llama"])
# Grouped by length only within the first epoch: in later ones the Trainer draws the order anew, patched model or not.
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"bf16": True},
    ],
    ids=["plain", "accumulation", "grouped", "bf16"],
)
def test_resumed_training_is_the_uninterrupted_one(build: Any, arguments: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer_for(make(build), tmp_path / "whole", **arguments)
    whole.train()
    first = trainer_for(make(build), tmp_path / "parts", StopAt(4), **arguments)
    first.train()
    assert len(losses(first)) == 4
    torch.manual_seed(99)  # a model whose adapters start elsewhere, calibrated on another batch
    again = meft_kernels.patch(build(), rank=4, dropout=0.1)
    meft_kernels.calibrate(again, collate(examples(again)[:1]))
    resumed = trainer_for(again, tmp_path / "parts", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == STEPS
    assert fraction_bits_of(require_state(again)) == fraction_bits_of(require_state(whole.model))
    expected = weights(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again).items())


def test_a_training_whose_streams_overflow_is_resumed_with_fewer_bits(tmp_path: Path) -> None:
    """The checkpoint has the bits that were too fine: fewer are kept, and taken where ``fraction_bits`` says so."""
    model = make(tiny_llama)
    first = trainer_for(model, tmp_path, StopAt(4))
    first.train()
    (bits,) = fraction_bits_of(require_state(model))
    with torch.no_grad():
        scale = torch.full_like(model.model.layers[1].mlp.down_proj.weight, 2e5)
        model.model.layers[1].mlp.down_proj.weight.mul_(scale)
    with pytest.raises(meft_kernels.StreamOverflowError, match=rf"patch with fraction_bits={bits - 2}"):
        trainer_for(model, tmp_path).train(resume_from_checkpoint=True)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.div_(scale)
    trainer_for(model, tmp_path).train(resume_from_checkpoint=True)
    assert fraction_bits_of(require_state(model)) == (bits - 2,)

    again = meft_kernels.patch(tiny_llama(), rank=4, dropout=0.1, fraction_bits=bits - 2)
    resumed = trainer_for(again, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(set(losses(resumed))) == STEPS
    assert fraction_bits_of(require_state(again)) == (bits - 2,)
    finer = meft_kernels.patch(tiny_llama(), rank=4, dropout=0.1, fraction_bits=bits + 1)
    with pytest.raises(meft_kernels.PatchError, match=f"patch with {bits}, or with fewer"):
        trainer_for(finer, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_checkpoints_hold_the_adapter_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make(tiny_llama)
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    held = load_file(checkpoint / "model.safetensors")
    assert held
    assert all(".meft." in name for name in held)
    assert load_file(checkpoint / "adapter_model.safetensors").keys() == held.keys()
    assert not (checkpoint / "config.json").exists()  # or from_pretrained would start a backbone anew
    fresh = meft_kernels.load_adapter(tiny_llama(), checkpoint)
    batch = collate(examples(model)[:4])
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**batch).logits, model.eval()(**batch).logits)
    trainer.save_model(str(tmp_path / "best"))
    assert sorted(path.name for path in (tmp_path / "best").glob("*.safetensors")) == [
        "adapter_model.safetensors", "model.safetensors"
    ]  # fmt: skip
    with caplog.at_level("WARNING"):
        trainer_for(make(tiny_llama), tmp_path, max_steps=7).train(resume_from_checkpoint=str(checkpoint))
    assert "missing keys" not in caplog.text


def test_the_best_checkpoint_is_taken(tmp_path: Path) -> None:
    class Worse(TrainerCallback):
        """Spoils the weights after the first evaluation."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step >= 3:
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.mul_(3)

    arguments = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-3}
    trainer = trainer_for(make(tiny_bert), tmp_path, Worse(), **arguments)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    held = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in held.items())


def test_gradient_accumulation_counts_tokens_once(tmp_path: Path) -> None:
    """``num_items_in_batch`` reaches the loss: two halves of a batch train as the whole does."""
    found = []
    for rows, steps in ((4, 1), (2, 2)):
        model = meft_kernels.patch(tiny_llama(), rank=4, fraction_bits=16, up_init_std=0.02)
        torch.manual_seed(0)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        arguments = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer = trainer_for(model, tmp_path / str(rows), optim="sgd", max_grad_norm=0.0, **arguments)
        trainer.train()
        found.append((losses(trainer), weights(model)))
    (whole_losses, whole), (parts_losses, parts) = found
    assert parts_losses == pytest.approx(whole_losses, rel=1e-5)
    for name, tensor in parts.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    trainer_for(make(tiny_llama), tmp_path, max_steps=2).train()
    other = trainer_for(make(tiny_llama, variant="meft1"), tmp_path)
    with pytest.raises(PatchError, match=r"patched with other settings.*variant=meft1"):
        other.train(resume_from_checkpoint=True)
    wider = trainer_for(meft_kernels.patch(tiny_llama(), rank=8), tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        wider.train(resume_from_checkpoint=True)


def test_predict_and_evaluate(tmp_path: Path) -> None:
    trainer = trainer_for(make(tiny_bert), tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(examples(trainer.model)[:5]).predictions.shape == (5, trainer.model.config.num_labels)


def test_an_adapters_state_dict_is_not_a_whole_one() -> None:
    model = make(tiny_llama)
    state = model.state_dict()
    adapter = {name: tensor for name, tensor in state.items() if ".meft." in name}
    assert model.load_state_dict(adapter, strict=False).missing_keys == []
    some = dict(state)
    del some["model.norm.weight"]
    assert model.load_state_dict(some, strict=False).missing_keys == ["model.norm.weight"]
    adapter.pop(next(iter(adapter)))
    assert len(model.load_state_dict(adapter, strict=False).missing_keys) > len(adapter)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(some)


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            calls["repo"] = repo_id
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, **kwargs: Any) -> None:
            calls["files"] = sorted(
                path.name for path in Path(kwargs["folder_path"]).iterdir() if path.name in kwargs["allow_patterns"]
            )
            calls["upload"] = kwargs["repo_id"]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = make(tiny_llama)
    expected = {
        "token": "t",
        "repo": "mine",
        "upload": "me/mine",
        "files": ["README.md", "adapter_config.json", "adapter_model.safetensors"],
    }
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="mine", token="t")
    assert calls == expected
    calls.clear()
    model.push_to_hub("mine", token="t", max_shard_size="1GB")
    assert calls == expected
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: meft_kernels" in card
    assert "AutoMeftModelForCausalLM" in card
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_class"] == "LlamaForCausalLM"
    (tmp_path / "out" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_callback(tmp_path: Path) -> None:
    model = make(tiny_llama)
    batch = collate(examples(model)[:2])
    trainer = trainer_for(model, tmp_path, meft_kernels.MeftCallback(verify_batch=batch), logging_steps=2)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["meft_checked_passes"] for entry in logged] == [2, 4, 6]
    assert all(entry["meft_tokens_per_second"] > 0 for entry in logged)
    width = max(len(row["input_ids"]) for row in trainer.train_dataset)
    stack = meft_kernels.describe(model).stacks[0]
    assert {entry["meft_kept_bytes"] % round(stack.bytes_per_token) for entry in logged} == {0}
    assert 4 * 3 * stack.bytes_per_token <= logged[-1]["meft_kept_bytes"] <= 4 * width * stack.bytes_per_token


def test_callback_without_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PatchError, match="not patched"):
        trainer_for(tiny_llama(), tmp_path, meft_kernels.MeftCallback()).train()
    model = make(tiny_llama)
    inner = model.model.layers[1].mlp
    forward = inner.forward
    drifting = iter(range(1000))
    monkeypatch.setattr(inner, "forward", lambda x: forward(x) + next(drifting))
    callback = meft_kernels.MeftCallback(verify_batch=collate(examples(model)[:2]))
    with pytest.raises(meft_kernels.NotRepeatableError, match="not exact on verify_batch, first at"):
        trainer_for(model, tmp_path, callback).train()
