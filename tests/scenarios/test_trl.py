"""TRL's trainers on a patched model. `pip install trl`; without it these tests are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

import meft_kernels

from ..models import TRAINABLE_START, relative_error, tiny_llama

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <eos> {% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(90))]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def words(start: int, count: int) -> str:
    return " ".join(f"w{(start + index) % 90}" for index in range(count))


TEXTS = [{"text": words(7 * row, 3 + row % 5)} for row in range(16)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": words(row, 3)},
            {"role": "assistant", "content": words(5 * row, 2 + row % 4)},
        ]
    }
    for row in range(16)
]
PAIRS = [
    {"prompt": words(row, 3), "chosen": f" {words(2 * row, 3 + row % 3)}", "rejected": f" {words(5 * row, 3)}"}
    for row in range(16)
]


def arguments(folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **overrides,
    }


def patched(model: Any = None, **settings: Any) -> Any:
    model = tiny_llama() if model is None else model
    torch.manual_seed(5)
    return meft_kernels.patch(model, **{**TRAINABLE_START, "fraction_bits": 20, **settings})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


SFT = {
    # gradient_checkpointing is on by default in TRL
    "as it comes": ({}, TEXTS),
    "packing": ({"packing": True, "max_length": 16}, TEXTS),
    "padding_free": ({"padding_free": True, "max_length": None}, TEXTS),
    "assistant_only_loss": ({"assistant_only_loss": True}, CHATS),
    "nll loss": ({"loss_type": "nll"}, TEXTS),
}


@pytest.mark.parametrize("name", SFT)
def test_sft(name: str, tmp_path: Path) -> None:
    """As under plain autograd, and it learns."""
    settings, rows = SFT[name]
    curves, weights = [], []
    for engine in ("reversible", "autograd"):
        model = patched(engine=engine)
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(**arguments(tmp_path / engine, **settings)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        trainer.train()
        curves.append(losses(trainer))
        weights.append(adapters(model))
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert relative_error(*weights) <= 1e-4  # Adam divides by the gradient's size, rounding in the smallest shows
    start = adapters(patched())
    assert relative_error(weights[0], start) > 1e-3
    checkpoint = meft_kernels.load_adapter(tiny_llama(), tmp_path / "reversible" / "checkpoint-4")
    assert all(torch.equal(p, weights[0][name]) for name, p in adapters(checkpoint).items())


@pytest.mark.parametrize("reused", [False, True], ids=["once", "twice"])
def test_grpo(reused: bool, tmp_path: Path) -> None:
    """What the model writes while it learns is judged, to the same losses and weights as under plain autograd."""
    judged: dict[str, list[list[float]]] = {}
    curves, weights = [], []
    for engine in ("reversible", "autograd"):
        judged[engine] = []

        def short(completions: list[str], engine: str = engine, **_: Any) -> list[float]:
            judged[engine].append([-float(len(set(text.split()))) for text in completions])
            return judged[engine][-1]

        model = patched(engine=engine)
        settings = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6}
        again = {"num_iterations": 2} if reused else {}  # the second reads log-probabilities of before the first
        trainer = trl.GRPOTrainer(
            model,
            short,
            trl.GRPOConfig(**arguments(tmp_path / engine, **settings, **again, temperature=1.5)),
            train_dataset=datasets.Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS]),
            processing_class=tokenizer(),
        )
        trainer.train()
        curves.append(losses(trainer))
        weights.append(adapters(model))
    assert judged["reversible"][0] == judged["autograd"][0]
    assert len({reward for row in judged["reversible"] for reward in row}) > 1
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert relative_error(*weights) <= 1e-3
    assert relative_error(weights[0], adapters(patched())) > 1e-3


def test_reward_model(tmp_path: Path) -> None:
    """A head of one number learns which of two texts is preferred, and is saved with the adapter."""
    curves, weights = [], []
    for engine in ("reversible", "autograd"):
        model = patched(reward_base(), engine=engine)
        trainer = trl.RewardTrainer(
            model,
            trl.RewardConfig(**arguments(tmp_path / engine)),
            train_dataset=datasets.Dataset.from_list(PAIRS),
            processing_class=tokenizer(),
        )
        trainer.train()
        curves.append(losses(trainer))
        weights.append(adapters(model))
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert relative_error(*weights) <= 1e-3
    assert "score.weight" in weights[0]
    checkpoint = meft_kernels.load_adapter(reward_base(), tmp_path / "reversible" / "checkpoint-4")
    assert all(torch.equal(p, weights[0][name]) for name, p in adapters(checkpoint).items())


def reward_base() -> Any:
    config = tiny_llama().config
    config.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def dpo(model: Any, reference: Any, folder: Path, pairs: list[dict[str, str]] = PAIRS, **overrides: Any) -> Any:
    return trl.DPOTrainer(
        model,
        reference,
        trl.DPOConfig(**arguments(folder, **overrides)),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_without_a_second_model(precompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference that shares the weights trains to the very bits that a copy of the pretrained model does."""
    precomputed = []
    compute = trl.DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        trl.DPOTrainer,
        "compute_ref_log_probs",
        lambda self, model, batch: precomputed.append(kind) or compute(self, model, batch),
    )
    runs = {}
    for kind in ("view", "copy"):
        model = patched()
        reference = meft_kernels.reference_model(model) if kind == "view" else tiny_llama()
        # A column that nobody reads, or the copy would be given what TRL has cached for the view.
        pairs = [{**pair, "kind": kind} for pair in PAIRS]
        trainer = dpo(model, reference, tmp_path / kind, pairs, precompute_ref_log_probs=precompute)
        trainer.train()
        runs[kind] = losses(trainer), adapters(model)
        logged = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
        assert len(logged) == 4
    assert set(precomputed) == ({"view", "copy"} if precompute else set())
    assert runs["view"][0] == runs["copy"][0]
    assert len(set(runs["view"][0])) == 4
    assert all(torch.equal(tensor, runs["copy"][1][name]) for name, tensor in runs["view"][1].items())
    assert relative_error(runs["view"][1], adapters(patched())) > 1e-3


def test_reference_log_probabilities(tmp_path: Path) -> None:
    """Those of a copy that was never patched, bit for bit, after adapters were trained."""
    model = patched()
    trainer = dpo(model, meft_kernels.reference_model(model), tmp_path)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    other = dpo(patched(), tiny_llama(), tmp_path / "copy")
    found = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    expected = other.compute_ref_log_probs(other.ref_model, batch)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not torch.equal(trainer.compute_ref_log_probs(model, batch)[0], expected[0])


def test_two_references_are_told_apart(tmp_path: Path) -> None:
    """TRL caches precomputed log-probabilities under a hash of the reference's weights."""
    from trl.trainer.utils import hash_module

    other = tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    hashes = {hash_module(model) for model in (tiny_llama(), meft_kernels.reference_model(patched()))}
    assert len(hashes) == 1
    assert hash_module(meft_kernels.reference_model(meft_kernels.patch(other))) not in hashes


def test_a_reference_that_follows_the_model_is_refused(tmp_path: Path) -> None:
    """The view has no weights to move: TRL's callback says so, and does not run on in silence."""
    model = patched()
    trainer = dpo(model, meft_kernels.reference_model(model), tmp_path, sync_ref_model=True, ref_model_sync_steps=1)
    with pytest.raises(ValueError, match="zip"):
        trainer.train()
