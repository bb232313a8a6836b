"""Models that nobody wrote a family file for: found, proven, as exact as those with one; or refused with a reason."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from typer.testing import CliRunner

import meft_kernels
from meft_kernels import UnsupportedModelError, supported_model_types
from meft_kernels.architectures import find_architecture
from meft_kernels.architectures.found import find
from meft_kernels.cli import app
from meft_kernels.state import require_state

from ..models import VARIANTS, StreamWitness, worst_error
from .exactness import FP32_BOUND, assert_exact, outputs_of, patched, step
from .zoo import LABELS, VOCABULARY, _make, batch_for, tiny

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
        results = []
        for engine in ("reversible", "autograd"):
            model = patched(make(name), variant=variant, engine=engine).train()
            witnesses = StreamWitness.on_every_stack(model)
            results.append(step(model, batch))
            if engine == "reversible":
                assert_exact(witnesses)
        (loss, gradients), (expected_loss, expected) = results
        assert loss == expected_loss
        assert gradients.keys() == expected.keys()
        assert all(gradients[key].abs().max() > 0 for key in gradients if ".meft." in key)
        assert worst_error(gradients, expected, floor=1e-3) <= FP32_BOUND
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
    before = _everything(model)
    numbers = torch.get_rng_state()
    find(model)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert _everything(model) == before


def _everything(model: nn.Module) -> list[Any]:
    """What a model is: its attributes by identity, its tensors by value, its hooks and modes."""
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, dict):
                found.append((name, [(key, id(each)) for key, each in value.items()]))
            else:
                found.append((name, id(value) if not isinstance(value, bool | int | str) else value))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append((tensor.requires_grad, tensor.grad is None, tensor.double().sum().item()))
    return found


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


# ------------------------------------------------------------------ what does not serve


class MadeUpConfig(PretrainedConfig):
    model_type = "made_up"


class Layer(nn.Module):
    """A layer that does what it should."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix = nn.Linear(16, 16)
        self.rise, self.fall = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.mix(self.norm1(x)).cumsum(1)
        return x + self.fall(torch.tanh(self.rise(self.norm2(x))))


class InPlace(Layer):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x += self.mix(self.norm1(x))
        return x + self.fall(torch.tanh(self.rise(x)))


class KeepsState(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


class OwnGenerator(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnGenerator:
        return OwnGenerator()

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=self.generator) if self.training else 0
        return super().forward(x) + noise


class Shares(Layer):
    """Layers of odd places read what the one before put into a box."""

    def forward(self, x: torch.Tensor, box: Any = None, **kwargs: Any) -> torch.Tensor:
        if "values" in box:
            return super().forward(x) + box["values"]
        box["values"] = self.mix(x)
        return super().forward(x)


class Behind(Layer):
    """The same behind everybody's back."""

    box: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor, first: bool = False, **kwargs: Any) -> torch.Tensor:
        if first:
            self.box["values"] = self.mix(x)
        return super().forward(x) + self.box["values"]


class Crosses(Layer):
    """Mixes what it is given as keys, which are the hidden states once more."""

    def forward(self, x: torch.Tensor, keys: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.mix(self.norm1(keys)).cumsum(1)
        return x + self.fall(torch.tanh(self.rise(self.norm2(x))))


class Beside(Layer):
    """Moves another state, too, by linear layers that come last."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, other: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x), other + self.down(torch.tanh(self.up(other)))


class Dead(Layer):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward(x).detach()


Run = Callable[[Any, torch.Tensor], torch.Tensor]


class MadeUp(PreTrainedModel):
    config_class = MadeUpConfig
    _supports_attention_backend = True

    def __init__(self, config: MadeUpConfig, layer: type[Layer] = Layer, run: Run | None = None) -> None:
        super().__init__(config)
        self.words = nn.Embedding(30, 16)
        self.stack = nn.ModuleList([layer() for _ in range(3)])
        self.out = nn.Linear(16, 30)
        self.run = run or in_turn
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> Any:
        return BaseModelOutput(last_hidden_state=self.out(self.run(self, self.words(input_ids))))


def in_turn(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    box: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.stack):
        x = layer(x, box=box, first=index == 0)
    return x


def backwards(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    for layer in reversed(model.stack):
        x = layer(x)
    return x


def early_exit(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    return model.stack[1](model.stack[0](x))


def crosses(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    for layer in model.stack:
        x = layer(x, x)
    return x


def beside(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    other = x.tanh()
    for layer in model.stack:
        x, other = layer(x, other)
    return x + other


def without_gradient(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return in_turn(model, x)


BAD: dict[str, tuple[type[Layer], Run, str]] = {
    "in place": (InPlace, in_turn, r"stack\.0 writes into the hidden states that it is given"),
    "state": (KeepsState, in_turn, r"stack\.0 gives something else when it is called again with the same arguments"),
    "generator": (OwnGenerator, in_turn, r"stack\.0 in training gives something else each time"),
    "behind": (Behind, in_turn, r"gradients go another way through stack\.0"),
    "dead": (Dead, in_turn, r"no gradient goes|nothing that the model returns depends on what stack"),
    "backwards": (Layer, backwards, r"stack\.2 was called where stack\.0 was due"),
    "early exit": (Layer, early_exit, r"stack\.2 was not called"),
    "no gradient": (Layer, without_gradient, r"no gradient goes from the model's outputs to its layers"),
}


def made_up(layer: type[Layer] = Layer, run: Run = in_turn) -> MadeUp:
    torch.manual_seed(0)
    return MadeUp(MadeUpConfig(vocab_size=30, hidden_size=16), layer, run).eval()


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_serve_is_refused(name: str) -> None:
    layer, run, message = BAD[name]
    model = made_up(layer, run).train()
    before = _everything(model)
    with pytest.raises(UnsupportedModelError, match=f"'made_up' has no family file, and its structure.*{message}"):
        meft_kernels.patch(model)
    assert _everything(model) == before


def _under_peft(model: MadeUp) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["mix"]))


def _under_ddp(model: MadeUp) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


@pytest.mark.parametrize("around", [_under_peft, _under_ddp, torch.compile])
def test_what_does_not_serve_is_refused_in_a_wrapper(around: Callable[[MadeUp], Any]) -> None:
    if around is _under_ddp:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = around(made_up(run=backwards))
        before = _everything(model)
        with pytest.raises(UnsupportedModelError, match=r"'made_up' .* layers run in another order than they stand"):
            meft_kernels.patch(model)
        assert _everything(model) == before
    finally:
        if around is _under_ddp:
            dist.destroy_process_group()


def test_what_serves_of_the_same_kind() -> None:
    model = meft_kernels.patch(made_up())
    assert "stack" in str(meft_kernels.describe(model))


def test_models_that_are_no_transformers() -> None:
    resnet = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    )
    model = made_up()
    layers = model.stack
    del model.stack
    model.stack = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)})
    model.run = lambda model, x: model.stack["1"](model.stack["0"](x))
    recurrent = made_up()
    recurrent.stack = nn.LSTM(16, 16, num_layers=2, batch_first=True)
    recurrent.run = lambda model, x: model.stack(x)[0]
    for bad, message in ((resnet, "resnet"), (model, "layers in a dict"), (recurrent, "layers in a dict")):
        before = _everything(bad)
        with pytest.raises(UnsupportedModelError, match=message):
            meft_kernels.patch(bad)
        assert _everything(bad) == before


def test_a_model_that_takes_no_made_up_inputs() -> None:
    model = made_up()
    model.forward = lambda words: MadeUp.forward(model, words)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="could not be called on made-up inputs: pass probe=batch"):
        meft_kernels.patch(model)
    meft_kernels.patch(model, probe={"words": torch.tensor([[3, 4, 5, 6]])})


def reads(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    middle = model.stack[0](x)
    x = model.stack[2](model.stack[1](middle))
    return x + middle.tanh()


@pytest.mark.parametrize(("layer", "run"), [(Layer, reads), (Crosses, crosses)], ids=["by the model", "by a layer"])
def test_hidden_states_read_between_layers(layer: type[Layer], run: Run) -> None:
    """Who uses what a layer in the middle gave has it, with its gradient: the model, or the next layer once more."""
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(made_up(layer, run), engine=engine).train()
        results.append(step(model, {"input_ids": ids}))
    assert results[0][0] == results[1][0]
    assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND
    with torch.no_grad():
        expected = made_up(layer, run)(ids).last_hidden_state
        found = meft_kernels.patch(made_up(layer, run))(ids).last_hidden_state
    # Not to be seen in a step: both engines would hand on the same wrong numbers.
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_masks_that_numpy_draws_are_those_of_the_seed() -> None:
    """As SpecAugment's: the pass that calibrates takes none of NumPy's random numbers, nor of Python's."""

    def masked(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
        drawn.append((np.random.rand(), random.random()))
        return in_turn(model, x)

    drawn: list[tuple[float, float]] = []
    model = meft_kernels.patch(made_up(run=masked))
    del drawn[:]
    np.random.seed(3)
    random.seed(3)
    model(torch.tensor([[3, 4, 5, 6]]))
    np.random.seed(3)
    random.seed(3)
    assert drawn == [(np.random.rand(), random.random())] * 2


class Writes(MadeUp):
    """Writes into what it is given, as a decoder that adds positions to its encoder's states."""

    def forward(self, inputs_embeds: torch.Tensor) -> Any:  # type: ignore[override]
        inputs_embeds += 1
        return BaseModelOutput(last_hidden_state=self.out(self.run(self, inputs_embeds)))


def test_a_model_that_writes_into_its_arguments() -> None:
    """Calibration, which calls it once more, hands it others."""
    model = meft_kernels.patch(
        Writes(MadeUpConfig(vocab_size=30, hidden_size=16)), probe={"inputs_embeds": torch.zeros(1, 4, 16)}
    )
    given = torch.zeros(1, 4, 16)
    with torch.no_grad():
        first = model(inputs_embeds=given).last_hidden_state
        assert torch.equal(given, torch.ones(1, 4, 16))
        assert torch.equal(model(inputs_embeds=torch.zeros(1, 4, 16)).last_hidden_state, first)


class Square(Layer):
    """Its FFN is as wide as its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(16, 16), nn.Linear(16, 16)


@pytest.mark.parametrize(("layer", "run"), [(Beside, beside), (Square, in_turn)])
def test_the_ffn_is_one_that_writes_hidden_states(layer: type[Layer], run: Run) -> None:
    model = made_up(layer, run)
    (layers,) = find(model).layers
    assert layers.ffn_reads(model.stack[0]) is model.stack[0].rise
    assert layers.ffn_writes(model.stack[0]) is model.stack[0].fall


@pytest.mark.parametrize("variant", ["meft1", "meft2"])
def test_tensors_that_layers_share_in_a_box(variant: str) -> None:
    """What a layer puts into a mapping is there for later ones, in the recompute as well, and has its gradient."""
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(made_up(Shares), engine=engine, variant=variant).train()
        witnesses = StreamWitness.on_every_stack(model)
        results.append(step(model, {"input_ids": ids}))
        if engine == "reversible":
            assert_exact(witnesses)
    assert results[0][0] == results[1][0]
    assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND
    with torch.no_grad():
        expected = made_up(Shares)(ids).last_hidden_state
        found = meft_kernels.patch(made_up(Shares))(ids).last_hidden_state
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_meta_weights_cannot_be_looked_at() -> None:
    with torch.device("meta"):
        model = MadeUp(MadeUpConfig(vocab_size=30, hidden_size=16))
    with pytest.raises(UnsupportedModelError, match=r"must be run to be looked at, and its weight .* is without data"):
        meft_kernels.patch(model)


# ------------------------------------------------------------------ what is found of families that have a file


@pytest.mark.parametrize("name", supported_model_types())
def test_found_is_what_was_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same streams and gradients bit for bit, the same names, files that fit both."""
    whole = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    batch = batch_for(tiny(name))
    written = patched(tiny(name, **whole), fraction_bits=16).train()
    meft_kernels.save_adapter(written, tmp_path)
    streams = StreamWitness.on_every_stack(written)
    loss, gradients = step(written, batch)
    model = tiny(name, **whole)
    monkeypatch.setattr("meft_kernels.targets.find_architecture", lambda model_type: None)
    found = meft_kernels.load_adapter(model, tmp_path).train()
    ours = StreamWitness.on_every_stack(found)
    found_loss, found_gradients = step(found, batch)
    assert found_loss == loss
    assert found_gradients.keys() == gradients.keys()
    assert all(torch.equal(found_gradients[key], gradients[key]) for key in gradients)
    for one, other in zip(ours, streams, strict=True):
        assert all(torch.equal(a, b) for i in other.before for a, b in zip(one.before[i], other.before[i], strict=True))
    assert list(found.state_dict()) == list(written.state_dict())
    assert str(meft_kernels.describe(found)) == str(meft_kernels.describe(written))
    apart = [stack.in_turn for stack in require_state(found).stacks]
    assert apart == [stack.in_turn for stack in require_state(written).stacks]
