"""The loss in chunks in a patched model and in training: settings, memory, copies, trainers."""

from __future__ import annotations

import copy
import io
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import meft_kernels
from meft_kernels import MeftConfig, PatchError, UnsupportedModelError
from meft_kernels.estimate.step import measure_step
from meft_kernels.estimate.twin import simulation
from meft_kernels.loss import bind_loss
from meft_kernels.loss.chunks import chunk_rows
from meft_kernels.loss.lazy import LazyLogits
from meft_kernels.memory import LiveTensorMeter

from .language_models import labelled, language_model
from .models import TRAINABLE_START, relative_error, tiny_bert, tiny_llama, train_step
from .test_bad_input import assert_unchanged, fingerprint
from .test_loss import ROUNDING, both

CPU = torch.device("cpu")


def patched(name: str = "llama", **settings: Any) -> Any:
    model = language_model(name)
    torch.manual_seed(5)
    return meft_kernels.patch(model, **{**TRAINABLE_START, "fraction_bits": 20, "loss_rows": 10, **settings})


def full(name: str = "llama", **settings: Any) -> Any:
    return patched(name, loss="full", loss_rows=None, **settings)


def is_chunked(model: Any) -> bool:
    return isinstance(model(**labelled(model)).logits, LazyLogits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "t5", "bart", "bert", "distilbert"])
@pytest.mark.parametrize("engine", ["reversible", "autograd"])
def test_patched(name: str, engine: str) -> None:
    """Adapters get the gradients that whole logits give them, and logits read are the same bits."""
    models = [full(name, engine=engine), patched(name, engine=engine)]
    batch = labelled(models[0])
    (loss, expected), (chunked, found) = (train_step(model, batch) for model in models)
    assert chunked == pytest.approx(loss, rel=ROUNDING)
    assert relative_error(found, expected) <= ROUNDING
    whole, lazy = (model(**batch).logits for model in models)
    assert isinstance(lazy, LazyLogits) and torch.equal(lazy + 0, whole)


def test_settings() -> None:
    assert is_chunked(patched(loss="chunked"))
    assert not is_chunked(full())
    assert not is_chunked(patched(loss_rows=None))  # so few logits are whole anyway
    for settings, message in (
        ({"loss": "lean"}, "loss must be one of auto, chunked, full"),
        ({"loss_rows": 0}, "loss_rows must be an integer >= 1"),
        ({"loss_rows": 2.5}, "loss_rows must be an integer >= 1"),
        ({"loss": "full", "loss_rows": 5}, "loss_rows belongs to"),
    ):
        with pytest.raises(ValueError, match=message):
            MeftConfig(**settings)
    with pytest.raises(PatchError, match="loss='auto'"):
        meft_kernels.patch(patched(), **TRAINABLE_START, fraction_bits=20, loss="full")


def test_a_model_without_such_a_head() -> None:
    model = tiny_bert()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match="no head over a vocabulary"):
        meft_kernels.patch(model, loss="chunked")
    with pytest.raises(UnsupportedModelError, match="no head over a vocabulary"):
        bind_loss(model)
    assert_unchanged(model, before)
    meft_kernels.patch(model, loss="auto")


def test_binding_alone() -> None:
    model = language_model("llama")
    before = fingerprint(model)
    binding = bind_loss(model, rows=10)
    with pytest.raises(PatchError, match="already"):
        bind_loss(model)
    binding.remove(model)
    assert_unchanged(model, before)
    for rows in (0, 1.5, True):
        with pytest.raises(ValueError, match="rows must be an integer >= 1"):
            bind_loss(model, rows=rows)  # type: ignore[arg-type]


def test_unpatch_and_saving(tmp_path: Path) -> None:
    model = language_model("llama")
    before = fingerprint(model)
    meft_kernels.patch(model, **TRAINABLE_START, loss_rows=10)
    assert model.state_dict().keys() == full().state_dict().keys()
    meft_kernels.save_adapter(model, tmp_path)
    loaded = meft_kernels.load_adapter(language_model("llama"), tmp_path)
    assert loaded(**labelled(loaded)).loss.isfinite()  # how the loss is computed is not taken from a file
    meft_kernels.unpatch(model)
    assert_unchanged(model, before)


def test_copies_are_bound_to_themselves() -> None:
    model = patched()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert is_chunked(other)
        assert other.lm_head.forward.module is other.lm_head
        loss = train_step(model, labelled(model))[0]
        assert train_step(other, labelled(model))[0] == loss
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        assert train_step(other, labelled(model))[0] != loss
        meft_kernels.unpatch(other)
        assert "forward" not in vars(other.lm_head) and is_chunked(model)
    head = copy.deepcopy(model.lm_head)  # alone, without a copy of the model
    assert head.forward.model is model and head.forward.module is head


def test_adapters_left_out_and_the_reference() -> None:
    model = patched()
    pretrained = language_model("llama").eval()
    batch = labelled(model)
    with torch.no_grad(), meft_kernels.disable_adapter(model):
        output = model.eval()(**batch)
    assert torch.equal(output.logits + 0, pretrained(**batch).logits)
    reference = meft_kernels.reference_model(model)
    assert float(reference(**batch).loss) == pytest.approx(float(pretrained(**batch).loss), rel=ROUNDING)
    report = meft_kernels.verify(model.train(), batch)
    assert report.bit_exact and report.repeats and report.gradient_error <= ROUNDING


def test_every_adapter_has_its_own_head() -> None:
    model = patched(modules_to_save=("lm_head",))
    meft_kernels.add_adapter(model, "other")
    meft_kernels.set_adapter(model, "other")
    assert is_chunked(model)
    loss, found = train_step(model, labelled(model))
    reference = full(modules_to_save=("lm_head",))
    meft_kernels.add_adapter(reference, "other")
    meft_kernels.set_adapter(reference, "other")
    assert "lm_head.weight" in found
    # The adapters of the two models begin with random numbers of their own; the head's own forward does not.
    reference.load_state_dict(model.state_dict())
    expected_loss, expected = train_step(reference, labelled(model))
    assert loss == pytest.approx(expected_loss, rel=ROUNDING)
    assert relative_error(found, expected) <= ROUNDING
    meft_kernels.unpatch(model)
    assert "forward" not in vars(model.lm_head)


PEFT = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
}


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("kind", ["llama", "llama, tied"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft(name: str, kind: str) -> None:
    """What PEFT trains in the head, or ties to it, has the gradients that it has without us."""
    peft = pytest.importorskip("peft")
    if name == "LoRA on the head" and kind == "llama, tied":
        pytest.skip("PEFT itself warns of it")
    model = peft.get_peft_model(language_model(kind), peft.LoraConfig(r=4, init_lora_weights=False, **PEFT[name]))
    both(model.train(), **labelled(model.get_base_model()))
    bind_loss(model, rows=10)
    assert is_chunked(model)


def test_a_quantised_head() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = language_model("llama", hidden_size=64)
    head = bitsandbytes.nn.Linear4bit(64, 97, bias=False, compute_dtype=torch.float32)
    head.load_state_dict({"weight": model.lm_head.weight.detach()})
    model.lm_head = head.to("cpu").requires_grad_(False)
    both(model, **labelled(model))


WIDE = {"vocab_size": 8192, "num_hidden_layers": 1, "max_position_embeddings": 2048}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_tensor_of_all_logits(trained: bool) -> None:
    """A step's peak with 512 rows of 8,192 words, 16 MiB in float32, of which whole logits take four."""
    peaks = {}
    for chunked in (False, True):
        model = language_model("llama", **WIDE)
        model.requires_grad_(False)
        model.model.norm.requires_grad_(True)
        model.lm_head.requires_grad_(trained)
        ids = torch.randint(8192, (2, 256))
        if chunked:
            bind_loss(model, rows=32)
        with LiveTensorMeter() as meter:
            output = model(input_ids=ids, labels=ids)
            output.loss.backward()
        peaks[chunked] = meter.peak_bytes
        assert output.logits.shape == (2, 256, 8192)
    logits = 512 * 8192 * 4
    assert peaks[False] > 2 * logits
    # Chunks take two to three MiB; the layer 1 and a trained head, whose gradients are three times 1 MiB, the rest.
    assert peaks[True] < logits / 2


def test_rows_of_a_chunk() -> None:
    """The bound that its docstring states, and no less than what keeps a device busy."""
    rows = chunk_rows(32768, 4096, 128256, CPU, trained=False)
    assert rows == 272 and 8 * rows * 128256 <= 1.05 * 2 * 32768 * 4096
    assert chunk_rows(32768, 4096, 128256, CPU, trained=True) == 1024
    cuda = torch.device("cuda")
    assert chunk_rows(64, 576, 49152, CPU, trained=False) == 128
    assert chunk_rows(64, 576, 49152, cuda, trained=False) == 352
    assert chunk_rows(64, 4096, 128256, cuda, trained=False) == 256
    assert chunk_rows(1, 8, 10**9, CPU, trained=False) == 128
    assert chunk_rows(1, 8, 97, CPU, trained=False) == 10816


def curve(folder: Path, model: Any, **settings: Any) -> list[float]:
    rows = [{name: tensor[0] for name, tensor in labelled(model, rows=1, seed=seed).items()} for seed in range(16)]
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", eval_strategy="steps", eval_steps=4,
        **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
    trainer.train()
    history = trainer.state.log_history
    return [entry[key] for key in ("loss", "grad_norm", "eval_loss") for entry in history if key in entry]


TRAINER: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "logits in evaluation": {"prediction_loss_only": False, "include_for_metrics": ["loss"]},
}


@pytest.mark.parametrize("name", TRAINER)
def test_trainer(name: str, tmp_path: Path) -> None:
    whole = curve(tmp_path / "full", full(), **TRAINER[name])
    chunked = curve(tmp_path / "chunked", patched(), **TRAINER[name])
    assert len(whole) == 9
    # Four steps of Adam, which divides by the gradients' size, rounding in the smallest of them as well.
    assert chunked == pytest.approx(whole, rel=2e-2 if name == "bf16" else 1e-4)
    assert len(set(chunked[:4])) == 4


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl(loss_type: str, tmp_path: Path) -> None:
    """Whether TRL computes its own loss from the head's weight, or reads the logits."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from .scenarios.test_trl import TEXTS, arguments, tokenizer

    curves = []
    for settings in ({"loss": "full"}, {"loss_rows": 5}):
        model = tiny_llama()
        torch.manual_seed(5)
        meft_kernels.patch(model, **TRAINABLE_START, fraction_bits=20, **settings)
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(**arguments(tmp_path, loss_type=loss_type, save_strategy="no")),
            train_dataset=datasets.Dataset.from_list(TEXTS),
            processing_class=tokenizer(),
        )
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        curves.append([entry[key] for entry in entries for key in ("loss", "mean_token_accuracy", "entropy")])
    assert len(curves[0]) == 12
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_simulated() -> None:
    """Tensors without data take what real ones do, to a percent; of a GPU, less than whole logits."""
    bytes_ = {}
    for where in ("real", "fake", "gpu", "gpu, full"):
        settings = {"loss": "full"} if where == "gpu, full" else {"loss": "chunked"}
        with ExitStack() as stack:
            if where != "real":
                stack.enter_context(simulation(gpu=where.startswith("gpu")))
            model = language_model("llama", **WIDE)
            meft_kernels.patch(model, **TRAINABLE_START, fraction_bits=20, **settings)
            ids = torch.randint(3, 8192, (2, 1500))
            bytes_[where] = measure_step(model, {"input_ids": ids, "labels": ids})
    assert bytes_["fake"].peak == pytest.approx(bytes_["real"].peak, rel=0.01)
    assert bytes_["fake"].kept == pytest.approx(bytes_["real"].kept, rel=0.01)
    logits = 3000 * 8192 * 4
    assert bytes_["real"].peak < logits / 2
    assert bytes_["gpu, full"].peak > 2 * logits > 2 * bytes_["gpu"].peak
