"""sentence-transformers: bi-encoders and cross-encoders, their trainers, and folders that hold the whole."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, TrainerCallback

import meft_kernels

from ..test_trainer import StopAt, losses

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")

WORDS = "a good bad film plot dull fine sun rain day night red blue one two"
TEXTS = ["a good film", "fine plot", "dull rain", "bad night", "red sun", "one day", "blue night", "two rain day"]
SETTINGS: dict[str, Any] = {"rank": 4, "up_init_std": 0.05}
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return str(folder)


def bi_encoder(base: str, **settings: Any) -> Any:
    model = sentence_transformers.SentenceTransformer(base, device="cpu")
    torch.manual_seed(5)
    return meft_kernels.patch(model, **{**SETTINGS, **settings})


def cross_encoder(base: str, **settings: Any) -> Any:
    torch.manual_seed(4)
    model = sentence_transformers.CrossEncoder(base, num_labels=1, device="cpu")
    return meft_kernels.patch(model, **{**SETTINGS, **settings})


def outputs(model: Any) -> torch.Tensor:
    """What the user gets of it: embeddings of texts, or scores of pairs."""
    if isinstance(model, sentence_transformers.CrossEncoder):
        return torch.as_tensor(model.predict(list(pairwise(TEXTS)), show_progress_bar=False))
    return model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)


BUILDERS = {"bi-encoder": bi_encoder, "cross-encoder": cross_encoder}
KINDS = pytest.mark.parametrize("kind", BUILDERS)


def trainer_for(model: Any, folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> Any:
    from datasets import Dataset

    if isinstance(model, sentence_transformers.CrossEncoder):
        from sentence_transformers.cross_encoder import CrossEncoderTrainer as Trainer
        from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as Arguments
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss as Loss

        rows = {"text": TEXTS, "other": TEXTS[::-1], "label": [float(i % 2) for i in range(len(TEXTS))]}
    else:
        from sentence_transformers import SentenceTransformerTrainer as Trainer
        from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as Loss

        rows = {"anchor": TEXTS[::2], "positive": TEXTS[1::2]}
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    data = Dataset.from_dict(rows)
    return Trainer(
        model,
        Arguments(str(folder), **{**settings, **arguments}),
        train_dataset=data,
        eval_dataset=data,
        loss=Loss(model),
        callbacks=list(callbacks),
    )


@KINDS
def test_start_and_way_back(kind: str, base: str) -> None:
    """Called by its ``forward``, the encoder calibrates, gives what it gave before, and can be unpatched."""
    model = BUILDERS[kind](base, up_init_std=0.0, inference="exact")
    own = type(model[0]).__mro__[1]
    with meft_kernels.disable_adapter(model):
        pretrained = outputs(model)
    patched = outputs(model)
    assert meft_kernels.describe(model).stacks[0].fraction_bits is not None
    assert 0 < (patched - pretrained).norm() < 0.02 * pretrained.norm()
    assert torch.equal(outputs(BUILDERS[kind](base, up_init_std=0.0, inference="exact", engine="autograd")), patched)
    meft_kernels.unpatch(model)
    assert type(model[0]) is own
    assert torch.equal(outputs(model), pretrained)


@KINDS
def test_gradients(kind: str, base: str, tmp_path: Path) -> None:
    """Of the library's own loss, through the two engines, dropout live."""
    found = []
    for engine in ("reversible", "autograd"):
        model = BUILDERS[kind](base, engine=engine, fraction_bits=20).train()
        trainer = trainer_for(model, tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(6)
        trainer.compute_loss(model, batch).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 8
    for name, expected in found[1].items():
        assert (found[0][name] - expected).norm() <= 1e-5 * max(expected.norm(), 1e-4), name


@KINDS
def test_the_whole_is_saved_and_loaded(kind: str, base: str, tmp_path: Path) -> None:
    model = BUILDERS[kind](base)
    model.max_seq_length = 6
    trainer_for(model, tmp_path / "run").train()
    expected = outputs(model.eval())
    model.save_pretrained(str(tmp_path / "whole"))
    with pytest.raises(ValueError, match="MeftTransformer"):  # sentence-transformers' own question
        type(model)(str(tmp_path / "whole"), device="cpu")
    again = type(model)(str(tmp_path / "whole"), device="cpu", trust_remote_code=True)
    assert again.max_seq_length == 6
    assert torch.equal(outputs(again), expected)
    assert (tmp_path / "whole" / "adapter_model.safetensors").stat().st_size < 64 * 1024
    other = BUILDERS[kind](base)
    meft_kernels.load_adapter(other, tmp_path / "whole")
    other.max_seq_length = 6
    assert torch.equal(outputs(other), expected)


@KINDS
def test_resumed_training_is_the_uninterrupted_one(kind: str, base: str, tmp_path: Path) -> None:
    whole = trainer_for(BUILDERS[kind](base), tmp_path / "whole")
    whole.train()
    every = {"save_strategy": "steps", "save_steps": 4}
    trainer_for(BUILDERS[kind](base), tmp_path / "parts", StopAt(4), **every).train()
    resumed = trainer_for(BUILDERS[kind](base), tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == STEPS
    assert torch.equal(outputs(resumed.model), outputs(whole.model))


@KINDS
def test_the_best_model_is_loaded(kind: str, base: str, tmp_path: Path) -> None:
    model = BUILDERS[kind](base)
    trainer = trainer_for(
        model,
        tmp_path,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=kind == "bi-encoder",  # so that it is not the last
    )
    trainer.train()
    chosen = Path(trainer.state.best_model_checkpoint)
    assert chosen.name != f"checkpoint-{STEPS}"
    from_folder = type(model)(str(chosen), device="cpu", trust_remote_code=True)
    last = type(model)(str(tmp_path / f"checkpoint-{STEPS}"), device="cpu", trust_remote_code=True)
    found = outputs(model.eval())
    assert torch.equal(found, outputs(from_folder))
    assert not torch.equal(found, outputs(last))


def test_new_words_come_with_the_folder(base: str, tmp_path: Path) -> None:
    model = sentence_transformers.SentenceTransformer(base, device="cpu")
    model.tokenizer.add_tokens(["moon"])
    model[0].model.resize_token_embeddings(len(model.tokenizer))
    with torch.no_grad():
        model[0].model.get_input_embeddings().weight[-1] = 1.0
    meft_kernels.patch(model, **SETTINGS)
    expected = model.encode(["a moon", "night"], convert_to_tensor=True, show_progress_bar=False)
    model.save_pretrained(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert torch.equal(again.encode(["a moon", "night"], convert_to_tensor=True, show_progress_bar=False), expected)
