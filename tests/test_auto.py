"""AutoMeftModel: a fine-tuned model from its adapter's folder alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels import AdapterFileError
from meft_kernels.patching.state import require_state

from .models import TRAINABLE_START, tiny_batch, tiny_bert, tiny_llama


def trained(build: Callable[[], Any], folder: Path) -> tuple[Any, torch.Tensor]:
    """A patched model whose base model lies in ``folder / "base"`` and whose adapter in ``folder / "adapter"``."""
    model = build()
    model.config.id2label = {index: f"class {index}" for index in range(model.config.num_labels)}
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")
    meft_kernels.patch(model, **TRAINABLE_START)
    with torch.no_grad():
        logits = model(**tiny_batch(model)).logits
    meft_kernels.save_adapter(model, folder / "adapter")
    return model, logits


@pytest.mark.parametrize(
    ("build", "auto"),
    [
        (tiny_bert, meft_kernels.AutoMeftModel),
        (tiny_bert, meft_kernels.AutoMeftModelForSequenceClassification),
        (tiny_llama, meft_kernels.AutoMeftModelForCausalLM),
    ],
)
def test_round_trip(build: Callable[[], Any], auto: Any, tmp_path: Path) -> None:
    model, logits = trained(build, tmp_path)
    again = auto.from_pretrained(tmp_path / "adapter")
    assert type(again) is type(model)
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(**tiny_batch(again)).logits, logits)
    if build is tiny_bert:
        assert again.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}


def test_number_of_classes_comes_from_the_adapter(tmp_path: Path) -> None:
    """The base model of most classifiers has no head."""
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    meft_kernels.patch(model, **TRAINABLE_START)
    with torch.no_grad():
        logits = model(**tiny_batch(model)).logits
    model.save_pretrained(tmp_path / "adapter")
    again = meft_kernels.AutoMeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**tiny_batch(again)).logits, logits)


def test_base_model_elsewhere_and_in_another_dtype(tmp_path: Path) -> None:
    trained(tiny_llama, tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    auto = meft_kernels.AutoMeftModelForCausalLM
    with pytest.raises(OSError, match="base"):
        auto.from_pretrained(tmp_path / "adapter")
    again = auto.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "moved", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert require_state(again).active == "default"


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["Trainer", "os.system", "__builtins__", "NoSuchModel", "pipeline", "torch"])
def test_class_that_is_no_model(name: str, tmp_path: Path) -> None:
    trained(tiny_llama, tmp_path)
    change(tmp_path / "adapter", base_model_class=name)
    with pytest.raises(AdapterFileError, match=f"names the model class '{name}'"):
        meft_kernels.AutoMeftModel.from_pretrained(tmp_path / "adapter")


def test_base_without_a_name(tmp_path: Path) -> None:
    model = meft_kernels.patch(tiny_llama())
    meft_kernels.save_adapter(model, tmp_path)
    with pytest.raises(AdapterFileError, match="does not name the base model"):
        meft_kernels.AutoMeftModel.from_pretrained(tmp_path)


def test_no_such_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterFileError, match="there is no folder"):
        meft_kernels.AutoMeftModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match="there is no folder 'someone/some-adapter'"):
        meft_kernels.AutoMeftModel.from_pretrained("someone/some-adapter", local_files_only=True)
    with pytest.raises(TypeError, match="from_pretrained"):
        meft_kernels.AutoMeftModel()


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, logits = trained(tiny_llama, tmp_path)
    asked: dict[str, Any] = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(tmp_path / "adapter")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    again = meft_kernels.AutoMeftModelForCausalLM.from_pretrained("someone/some-adapter", revision="v1")
    assert asked["name"] == "someone/some-adapter"
    assert asked["revision"] == "v1"
    assert asked["allow_patterns"] == ["adapter_config.json", "adapter_model.safetensors"]
    with torch.no_grad():
        assert torch.equal(again(**tiny_batch(again)).logits, logits)


def test_transformers_own_auto_class_says_no(tmp_path: Path) -> None:
    """It takes any adapter_config.json for PEFT's; whatever it does, it must not hand out an untrained model."""
    import transformers

    trained(tiny_llama, tmp_path)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with pytest.raises((TypeError, ValueError, KeyError, OSError, ImportError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_a_base_model_that_was_moved(tmp_path: Path) -> None:
    model, logits = trained(tiny_bert, tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(OSError, match=r"base model .*base', which .*adapter_config.json names, .* pass base_model="):
        meft_kernels.AutoMeftModel.from_pretrained(tmp_path / "adapter")
    again = meft_kernels.AutoMeftModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "moved")
    with torch.no_grad():
        assert torch.equal(again(**tiny_batch(model)).logits, logits)
