"""A resized vocabulary, its new rows set by hand: what is saved, loaded and resumed computes the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

import meft_kernels
from meft_kernels import AdapterFileError
from meft_kernels.patching.state import find_state

from ..models import TRAINABLE_START, VOCABULARY, tiny_llama

NEW = 2
IDS = torch.tensor([[5, VOCABULARY, 7, VOCABULARY + 1, 9]])


def masked() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes)).eval()


def encoder_decoder() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, pad_token_id=1, **sizes, **heads)).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "tied": lambda: tiny_llama(2, 32, tie_word_embeddings=True),
    "untied": lambda: tiny_llama(2, 32, tie_word_embeddings=False),
    "masked": masked,
    "encoder-decoder": encoder_decoder,
}


def resized(model: Any) -> Any:
    """With more tokens, whose rows its user sets."""
    model.resize_token_embeddings(VOCABULARY + NEW, mean_resizing=False)
    with torch.no_grad():
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.weight[VOCABULARY:] = torch.linspace(-1, 1, embeddings.weight[VOCABULARY:].numel()).view(NEW, -1)
            if getattr(embeddings, "bias", None) is not None:
                embeddings.bias[VOCABULARY:] = 0.5
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def published(build: Callable[[], Any], folder: Path) -> Callable[[], Any]:
    """The base model on disk; gives what loads it."""
    model = build()
    model.save_pretrained(folder)
    return lambda: type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_new_rows_are_saved(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load = published(MODELS[kind], tmp_path / "base")
    model = meft_kernels.patch(resized(load()), **TRAINABLE_START)
    expected = logits(model)
    meft_kernels.save_adapter(model, tmp_path / "adapter")
    other = load()
    other.resize_token_embeddings(VOCABULARY + NEW)  # rows drawn at random
    meft_kernels.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(other), expected)
    assert not any(p.requires_grad for n, p in other.named_parameters() if ".meft." not in n)
    # From the published model alone; what was loaded is saved with its rows again.
    again = meft_kernels.AutoMeftModel.from_pretrained(tmp_path / "adapter")
    assert again.config.vocab_size == VOCABULARY + NEW
    assert torch.equal(logits(again), expected)
    meft_kernels.save_adapter(again, tmp_path / "again")
    once_more = meft_kernels.AutoMeftModel.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(once_more), expected)
    assert not [record for record in caplog.records if record.name.startswith("meft_kernels")]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied


def test_a_model_that_was_not_resized_is_told(tmp_path: Path) -> None:
    load = published(MODELS["tied"], tmp_path / "base")
    meft_kernels.save_adapter(meft_kernels.patch(resized(load()), rank=4), tmp_path / "adapter")
    model = load()
    with pytest.raises(AdapterFileError, match=r"vocab_size is 99, here it is 97.*resize_token_embeddings\(99\) first"):
        meft_kernels.load_adapter(model, tmp_path / "adapter")
    assert find_state(model) is None
    meft_kernels.save_adapter(meft_kernels.patch(load(), rank=4), tmp_path / "plain")
    with pytest.raises(AdapterFileError, match=r"vocab_size is 97, here it is 99.*resize_token_embeddings\(97\) first"):
        meft_kernels.load_adapter(resized(load()), tmp_path / "plain")


def test_a_vocabulary_as_published_is_not_saved(tmp_path: Path) -> None:
    load = published(MODELS["tied"], tmp_path / "base")
    meft_kernels.save_adapter(meft_kernels.patch(load(), rank=4), tmp_path / "adapter")
    assert all(".meft." in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_trained_rows_are_saved_as_trained_ones(tmp_path: Path) -> None:
    load = published(MODELS["tied"], tmp_path / "base")
    model = meft_kernels.patch(resized(load()), modules_to_save=("model.embed_tokens",), **TRAINABLE_START)
    meft_kernels.save_adapter(model, tmp_path / "adapter")
    again = meft_kernels.AutoMeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert again.model.embed_tokens.weight.requires_grad
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_state_dict_holds_them(tmp_path: Path) -> None:
    """As a Trainer resumes: into a model that was resized and patched by the same script."""
    load = published(MODELS["tied"], tmp_path / "base")
    model = meft_kernels.patch(resized(load()), **TRAINABLE_START)
    model.save_pretrained(tmp_path / "checkpoint")
    other = load()
    other.resize_token_embeddings(VOCABULARY + NEW)
    meft_kernels.patch(other, **TRAINABLE_START)
    result = other.load_state_dict(load_file(tmp_path / "checkpoint" / "model.safetensors"), strict=False)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(logits(other), logits(model))


def test_a_base_without_a_name_is_compared(tmp_path: Path) -> None:
    """Where nothing tells of a published size, the rows are not saved, and another's are refused."""
    model = meft_kernels.patch(resized(MODELS["tied"]()), **TRAINABLE_START)
    meft_kernels.save_adapter(model, tmp_path)
    same = meft_kernels.load_adapter(resized(MODELS["tied"]()), tmp_path)
    assert torch.equal(logits(same), logits(model))
    other = MODELS["tied"]()
    other.resize_token_embeddings(VOCABULARY + NEW)
    with pytest.raises(AdapterFileError, match=r"another model\.embed_tokens\.weight .*vocabulary was changed"):
        meft_kernels.load_adapter(other, tmp_path)
    assert find_state(other) is None


@pytest.mark.parametrize("kind", ["tied", "encoder-decoder"])
def test_adapters_that_bring_rows(kind: str, tmp_path: Path) -> None:
    """Equal ones are shared, others are each adapter's own."""
    load = published(MODELS[kind], tmp_path / "base")
    expected = {}
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        model = meft_kernels.patch(resized(load()), **TRAINABLE_START)
        with torch.no_grad():
            model.get_input_embeddings().weight[VOCABULARY:] = value
            if kind == "encoder-decoder":
                model.final_logits_bias[:, VOCABULARY:] = value
        expected[name] = logits(model)
        meft_kernels.save_adapter(model, tmp_path / name)
    all_three = meft_kernels.AutoMeftModel.from_pretrained(tmp_path / "a")
    weight = all_three.get_input_embeddings().weight
    for name in expected:
        meft_kernels.load_adapter(all_three, tmp_path / name, name)
        assert (all_three.get_input_embeddings().weight is weight) == (name != "c")
    for name in (*expected, "default"):
        meft_kernels.set_adapter(all_three, name)
        assert torch.equal(logits(all_three), expected["a" if name == "default" else name])
        assert all_three.get_output_embeddings().weight is all_three.get_input_embeddings().weight
        meft_kernels.save_adapter(all_three, tmp_path / f"{name} again")
        alone = meft_kernels.AutoMeftModel.from_pretrained(tmp_path / f"{name} again")
        assert torch.equal(logits(alone), logits(all_three))


def shuffled(model: Any) -> None:
    model.model.embed_tokens.weight[1:5] = model.model.embed_tokens.weight[1:5].flip(0)


def normed(model: Any) -> None:
    model.model.norm.weight[3] = 2.0


@pytest.mark.parametrize(("change", "name"), [(shuffled, "model.embed_tokens.weight"), (normed, "model.norm.weight")])
def test_a_base_that_was_changed_is_named(
    change: Callable[[Any], None], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load = published(MODELS["tied"], tmp_path / "base")
    model = load()
    with torch.no_grad():
        change(model)
    meft_kernels.save_adapter(meft_kernels.patch(model, rank=4), tmp_path / "adapter")
    meft_kernels.load_adapter(load().bfloat16(), tmp_path / "adapter")  # rounded: nothing can be said
    assert not caplog.records
    meft_kernels.load_adapter(load(), tmp_path / "adapter")
    assert f"of which 1 tensors differ from this one's, {name} among them" in caplog.text
    caplog.clear()
    with torch.no_grad():
        change(same := load())
    meft_kernels.load_adapter(same, tmp_path / "adapter")
    assert not caplog.records


def test_a_folder_of_an_earlier_version(tmp_path: Path) -> None:
    """Without what is written now of the base; its calibration in two integers."""
    from meft_kernels.engine import stack_state

    load = published(MODELS["untied"], tmp_path / "base")
    model = meft_kernels.patch(resized(load()), fraction_bits=18, **TRAINABLE_START)
    meft_kernels.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    description = json.loads(path.read_text())
    kept = {key: value for key, value in description.items() if key not in ("parts", "tied", "base_checksums")}
    path.write_text(json.dumps(kept))
    weights = load_file(path.with_name("adapter_model.safetensors"))
    weights = {key: tensor for key, tensor in weights.items() if ".meft." in key}
    settings = stack_state._digest(find_state(model).config)  # type: ignore[union-attr]
    weights["model.layers.0.meft.state._extra_state"] = torch.tensor([settings, 18])
    save_file(weights, path.with_name("adapter_model.safetensors"))
    again = meft_kernels.load_adapter(resized(load()), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
