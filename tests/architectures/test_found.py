"""Models that nobody wrote a family file for: found, proven, as exact as those with one; or refused with a reason."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import meft_kernels
from meft_kernels import UnsupportedModelError
from meft_kernels.architectures import find_architecture
from meft_kernels.architectures.found import find
from meft_kernels.patching import targets
from meft_kernels.programs.cli import app

from ..models import VARIANTS, worst_error
from .exactness import FP32_BOUND, both_engines, everything_of, outputs_of, patched, step
from .zoo import LABELS, VOCABULARY, _make, batch_for

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLVED = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
_SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_SEQ2SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2}
_VISION = {"image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 32, "intermediate_size": 48}
_VISION |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": LABELS}

_BLOOM = {"n_layer": 2, "hidden_size": 32, "n_head": 4, "vocab_size": VOCABULARY}

# model type: settings of its config, the class, whether its layers are taken apart
CASES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "granite": (_TEXT, "GraniteForCausalLM", True),  # scaled residuals
    "glm4": (_TEXT, "Glm4ForCausalLM", True),  # gate and up in one, four norms
    "gpt_oss": ({**_TEXT, **_EXPERTS}, "GptOssForCausalLM", True),  # an FFN that returns the router's choice too
    "qwen3_next": ({**_TEXT, **_EXPERTS, **_LINEAR, **_MIXED}, "Qwen3NextForCausalLM", True),  # linear attention
    "lfm2": ({**_TEXT, **_CONVOLVED}, "Lfm2ForCausalLM", True),  # convolutions
    "cohere": (_TEXT, "CohereForCausalLM", False),  # attention and MLP side by side
    "bloom": (_BLOOM, "BloomForCausalLM", True),  # parts that add the residual themselves
    "camembert": (_TEXT, "CamembertForSequenceClassification", True),  # post-norm
    "nomic_bert": (_TEXT, "NomicBertForMaskedLM", True),  # norms of the sums
    "marian": ({**_SEQ2SEQ, "vocab_size": VOCABULARY, "pad_token_id": 0}, "MarianMTModel", True),  # encoder, decoder
    "mamba": ({**_TEXT, "state_size": 4, "expand": 2}, "MambaForCausalLM", False),  # no attention at all
    "dinov2": (_VISION, "Dinov2ForImageClassification", True),  # scaled parts
    "siglip_vision_model": (_VISION, "SiglipVisionModel", True),
}


def make(name: str, **overrides: Any) -> Any:
    """A tiny model of the type; a new one, the same each time."""
    settings, head, _ = CASES[name]
    config_class = transformers.CONFIG_MAPPING[name]
    known = {*config_class().to_dict(), *config_class.attribute_map, "num_labels"}
    settings = {key: value for key, value in settings.items() if key in known}
    torch.manual_seed(0)
    return _make(getattr(transformers, head), config_class(**{**settings, **overrides}))


every_case = pytest.mark.parametrize("name", CASES)


def variants_of(name: str) -> tuple[str, ...]:
    """All of one, and meft3 of one of each way to take layers apart."""
    if name == "granite":
        return VARIANTS
    return ("meft2", "meft3") if name in ("bloom", "nomic_bert", "camembert") else ("meft2",)


@every_case
def test_exact(name: str) -> None:
    """Rebuilt inputs bit for bit, gradients of plain autograd, near the pretrained model, and no trace afterwards."""
    assert find_architecture(name) is None, "take one without a family file"
    batch = batch_for(make(name))
    for variant in variants_of(name):
        found, expected = both_engines(
            lambda engine, variant=variant: patched(make(name), variant=variant, engine=engine).train(),
            lambda model: step(model, batch),
        )
        assert found.keys() == expected.keys()
        assert all(found[key].abs().max() > 0 for key in found if ".meft." in key)
        assert worst_error(found, expected, floor=1e-3) <= FP32_BOUND
    model = make(name)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = outputs_of(model(**batch))
        start = outputs_of(meft_kernels.patch(model)(**batch))
        after = outputs_of(meft_kernels.unpatch(model)(**batch))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert list(model.state_dict()) == keys
    for one, other in zip(before, start, strict=True):
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.03 * one.norm()


@every_case
def test_blocks(name: str) -> None:
    """Where a layer was taken apart it is run in tiles, and is the same layer."""
    batch = batch_for(make(name))
    model = make(name)
    found = find(model)
    assert all(layers.apart == CASES[name][2] for layers in found.layers)
    report = meft_kernels.verify(meft_kernels.patch(make(name), fraction_bits=16).train(), batch)
    assert report.bit_exact and report.blocks_match
    if CASES[name][2]:
        results = []
        for tile in ("off", 3):
            model = patched(make(name), tile=tile, fraction_bits=16)
            results.append(step(model, batch))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
        assert worst_error(results[1][1], results[0][1], floor=1e-2) < 1e-2  # other roundings, but the same function
    else:
        with pytest.raises(UnsupportedModelError, match="could not be taken apart: pass variant='meft1' or 'meft2'"):
            meft_kernels.patch(make(name), variant="meft3")


def test_looking_leaves_no_trace() -> None:
    model = make("qwen3_next").train()
    torch.manual_seed(7)
    before = everything_of(model)
    numbers = torch.get_rng_state()
    find(model)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert everything_of(model) == before


def test_what_was_found_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "meft_kernels"):
        meft_kernels.patch(make("lfm2"))
    lines = [record.getMessage() for record in caplog.records if "no family file" in record.getMessage()]
    assert lines == [
        "found in Lfm2ForCausalLM (lfm2), no family file: model.layers, 2 Lfm2DecoderLayer, H = 32, FFN feed_forward, "
        "in two blocks"
    ]


def test_save_load_copy_and_pickle(tmp_path: Path) -> None:
    model = patched(make("granite"))
    batch = batch_for(model)
    with torch.no_grad():
        expected = model(**batch).logits
        meft_kernels.save_adapter(model, tmp_path)
        loaded = meft_kernels.load_adapter(make("granite"), tmp_path)
        for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**batch).logits, expected)


def test_blocks_run_uncompiled() -> None:
    """They are made anew in every call: what is compiled for one would serve no other."""
    batch = batch_for(make("granite"))
    results = []
    for compiled in (False, True):
        model = patched(make("granite"), variant="meft3", fraction_bits=16, compile_layers=compiled).train()
        results.append(step(model, batch))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1][key], gradient) for key, gradient in results[0][1].items())


def test_a_patched_model_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pickle.loads(pickle.dumps(patched(make("camembert"))))
    monkeypatch.setattr(targets, "find", lambda *args, **kwargs: pytest.fail("it is patched"))
    meft_kernels.add_adapter(model, "b", rank=3)
    meft_kernels.set_adapter(model, "b")
    made = next(part for name, part in model.named_modules() if name.endswith("meft.ffn"))
    assert made.activation_name == "gelu"
    assert made.dropout.p == model.config.hidden_dropout_prob


def test_one_layer_of_each_kind_is_called_again() -> None:
    """What a proof costs: a forward, and a few calls of one layer of a kind."""
    model = make("granite", num_hidden_layers=6)
    calls = [0] * 6
    for index, layer in enumerate(model.model.layers):
        plain = layer.self_attn.q_proj.forward

        def counted(x: Any, index: int = index, plain: Any = plain) -> Any:
            calls[index] += 1
            return plain(x)

        layer.self_attn.q_proj.forward = counted
    find(model)
    assert calls[:5] == [1] * 5
    assert calls[5] <= 4


def test_a_lora_inside() -> None:
    peft = pytest.importorskip("peft")
    results = []
    batch = batch_for(make("granite"))
    for engine in ("reversible", "autograd"):
        torch.manual_seed(3)
        settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(make("granite"), settings)
        meft_kernels.patch(model, adapters="none", engine=engine).train()
        results.append(step(model, batch))
    assert len(results[0][1]) == 2 * 7 * 2
    assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND


@pytest.mark.parametrize(
    ("name", "code", "message"), [("lfm2", 0, "FFN feed_forward"), ("resnet", 1, "its structure does not serve")]
)
def test_a_model_is_looked_at_from_its_config(name: str, code: int, message: str, tmp_path: Path) -> None:
    config_class = transformers.CONFIG_MAPPING[name]
    settings = {key: value for key, value in _TEXT.items() if key != "head_dim"}
    if name == "lfm2":
        settings |= {"num_hidden_layers": 6, "layer_types": ["conv"] * 5 + ["full_attention"]}
    config_class(**settings, embedding_size=32).save_pretrained(tmp_path)
    found = CliRunner().invoke(app, ["models", "--probe", str(tmp_path)])
    assert found.exit_code == code
    assert message in found.output
    if name == "lfm2":
        assert "model.layers, 4 Lfm2DecoderLayer" in found.output  # few layers, of both kinds


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["models", "--probe", str(tmp_path / "nothing")])
    assert found.exit_code == 2
    assert "no model" in found.output
