"""The guide to a family of one's own, followed to the letter; and a model whose code comes with its weights."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import meft_kernels
from meft_kernels.architectures import find_architecture, registry

from ..models import VARIANTS, StreamWitness, worst_error
from .exactness import FP32_BOUND, assert_exact, patched, step
from .written import spec_of
from .zoo import batch_for, tiny

GUIDE = Path(meft_kernels.__file__).parent / "architectures" / "README.md"
BATCH = {
    "input_ids": torch.tensor([[3, 4, 5, 6, 7], [8, 9, 3, 4, 5]]),
    "labels": torch.tensor([[3, 4, 5, 6, 7], [8, 9, 3, 4, 5]]),
}


@pytest.fixture(autouse=True)
def registry_as_it_was() -> Iterator[None]:
    before = dict(registry._SPECS)
    yield
    registry._SPECS.clear()
    registry._SPECS.update(before)


def assert_trains_exactly(make: Any) -> None:
    for variant in VARIANTS:
        results = []
        for engine in ("reversible", "autograd"):
            model = patched(make(), variant=variant, engine=engine).train()
            witnesses = StreamWitness.on_every_stack(model)
            results.append(step(model, BATCH))
            if engine == "reversible":
                assert_exact(witnesses)
        assert results[0][0] == results[1][0]
        assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND


def test_the_guide() -> None:
    code, check = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert "granite" not in meft_kernels.supported_model_types(), "take a family for the guide that is not built in"

    def granite() -> Any:
        torch.manual_seed(0)
        config = transformers.GraniteConfig(
            vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, residual_multiplier=0.5, pad_token_id=0,
        )  # fmt: skip
        return transformers.GraniteForCausalLM(config).eval()

    with pytest.raises(meft_kernels.UnsupportedModelError, match="granite"):
        meft_kernels.patch(granite(), trust="written")
    exec(code, {})
    assert_trains_exactly(granite)
    for variant in VARIANTS:
        model = granite()
        with torch.no_grad():
            expected = model(**BATCH).loss
            found = meft_kernels.patch(model, variant=variant)(**BATCH).loss
        assert abs(found - expected) < 0.01  # blocks that were no part of the layer would show here
    for variant in VARIANTS:
        model = meft_kernels.patch(granite().train(), variant=variant)
        report = meft_kernels.verify(model, BATCH)
        assert report.bit_exact
        assert report.blocks_match
    exec(check, {"meft_kernels": meft_kernels, "model": granite().train(), "batch": BATCH})


@pytest.mark.parametrize("wrong", ["mlp", "attention", "extras"])
def test_verify_finds_blocks_that_are_not_the_layer(wrong: str) -> None:
    """Engines agree about wrong blocks as well as about right ones, and a random model's loss says nothing."""
    spec = find_architecture("llama")
    assert spec is not None
    right = spec.layers[0]
    blocks = {
        "mlp": {"mlp_block": lambda layer, x, **kwargs: layer.mlp(layer.post_attention_layernorm(x))},
        "attention": {"attention_block": lambda layer, x, **kwargs: x},
        "extras": {"attention_block": lambda layer, x, **kwargs: (right.attention_block(layer, x, **kwargs), None)},
    }
    layer = dataclasses.replace(right, **blocks[wrong])
    model, batch = tiny("llama"), batch_for(tiny("llama"))
    meft_kernels.register_architecture(dataclasses.replace(spec, layers=(layer,)))
    report = meft_kernels.verify(meft_kernels.patch(model), batch)
    assert report.bit_exact
    assert not report.blocks_match
    assert "blocks are the layer" in str(report)
    in_tiles = meft_kernels.patch(tiny("llama"), tile=3, fraction_bits=16).train()
    with pytest.raises(meft_kernels.UnsupportedModelError, match="do not compute what the layer does"):
        in_tiles(**batch)


REMOTE_CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MineConfig(PretrainedConfig):
    model_type = "mine"

    def __init__(self, width=32, depth=3, **kwargs):
        super().__init__(**kwargs)
        self.width, self.depth = width, depth


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, scale):
        x = x + self.mix(self.norm1(x)).cumsum(1) * scale
        return x + self.fall(torch.tanh(self.rise(self.norm2(x))))


class MineModel(PreTrainedModel):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(20, config.width)
        self.stack = nn.ModuleList([Layer(config.width) for _ in range(config.depth)])
        self.head = nn.Linear(config.width, 20)
        self.post_init()

    def forward(self, input_ids, labels=None):
        x = self.words(input_ids)
        for layer in self.stack:
            x = layer(x, 0.5)
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""


def test_a_model_that_brings_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other names for everything: config.width, a tensor-free positional argument, no rotary embeddings, no cache."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "modeling_mine.py").write_text(REMOTE_CODE, encoding="utf-8")
    names = '"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineModel"'
    (folder / "config.json").write_text(f'{{"model_type": "mine", "auto_map": {{{names}}}}}', encoding="utf-8")

    def mine() -> Any:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()

    meft_kernels.register_architecture(
        meft_kernels.ArchitectureSpec(
            model_types=("mine",),
            layers=(
                meft_kernels.LayerSpec(
                    layer_class="Layer",
                    attention_block=lambda layer, x, scale: x + layer.mix(layer.norm1(x)).cumsum(1) * scale,
                    mlp_block=lambda layer, x, scale: x + layer.fall(torch.tanh(layer.rise(layer.norm2(x)))),
                    ffn_reads=lambda layer: layer.rise,
                    ffn_writes=lambda layer: layer.fall,
                ),
            ),
            activation=lambda config: "tanh",
            hidden_size=lambda config: config.width,
        )
    )
    assert_trains_exactly(mine)
    model = meft_kernels.patch(mine(), rank=4)
    assert "stack" in str(meft_kernels.describe(model))
    with torch.no_grad():
        expected = model(**BATCH).logits
        meft_kernels.save_adapter(model, tmp_path / "adapter")
        found = meft_kernels.load_adapter(mine(), tmp_path / "adapter")(**BATCH).logits
    assert torch.equal(found, expected)


def test_a_layer_that_returns_a_tuple_of_one(tmp_path: Path) -> None:
    """A model that takes ``layer(x)[0]`` must not be given the first row of a batch."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.rise, self.fall = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            x = x + torch.tanh(self.mix(x))
            return (x + self.fall(torch.tanh(self.rise(x))),)

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
            self.stack = nn.ModuleList([Layer() for _ in range(3)])
            self.post_init()

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
            x = self.words(input_ids)
            for layer in self.stack:
                x = layer(x)[0]
            logits = self.head(x)
            loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return CausalLMOutput(loss=loss, logits=logits)

    def make() -> Any:
        torch.manual_seed(0)
        config = transformers.PretrainedConfig(hidden_size=8)
        config.model_type = "tuples"
        return Model(config).eval()

    kind = meft_kernels.LayerSpec(
        layer_class="Layer",
        attention_block=lambda layer, x: (x + torch.tanh(layer.mix(x)),),
        mlp_block=lambda layer, x: x + layer.fall(torch.tanh(layer.rise(x))),
        ffn_reads=lambda layer: layer.rise,
        ffn_writes=lambda layer: layer.fall,
    )
    meft_kernels.register_architecture(
        meft_kernels.ArchitectureSpec(model_types=("tuples",), layers=(kind,), activation=lambda config: "tanh")
    )
    assert_trains_exactly(make)
    assert patched(make(), frozen_layers=2)(**BATCH).logits.shape == (2, 5, 20)


@pytest.mark.parametrize("wrong", ["ffn_writes", "layerdrop", "post_norm", "activation"])
def test_a_spec_that_does_not_fit_changes_nothing(wrong: str) -> None:
    """The commonest mistake of somebody who follows the guide."""
    spec = spec_of("gpt2")
    broken = {
        "ffn_writes": lambda layer: layer.mlp.c_proj if layer.attn.layer_idx < 2 else layer.nope,
        "layerdrop": lambda config: config.nope,
        "post_norm": lambda config: config.nope,
    }
    if wrong == "activation":
        meft_kernels.register_architecture(dataclasses.replace(spec, activation=lambda config: config.nope))
    else:
        layer = dataclasses.replace(spec.layers[0], **{wrong: broken[wrong]})
        meft_kernels.register_architecture(dataclasses.replace(spec, layers=(layer,)))
    model = tiny("gpt2")
    keys, required = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(meft_kernels.UnsupportedModelError, match=r"ArchitectureSpec of 'gpt2' does not fit .*'nope'"):
        meft_kernels.patch(model)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == required
    assert not any("forward" in vars(module) for module in model.modules())
    meft_kernels.register_architecture(spec)
    meft_kernels.unpatch(meft_kernels.patch(model))


def test_a_pickle_whose_family_is_not_registered_says_so() -> None:
    spec = spec_of("gpt2")
    meft_kernels.register_architecture(dataclasses.replace(spec, model_types=("mine-too",)))
    model = tiny("gpt2")
    model.config.model_type = "mine-too"
    stored = pickle.dumps(meft_kernels.patch(model))
    registry._SPECS.pop("mine-too")
    with pytest.raises(meft_kernels.UnsupportedModelError, match="'mine-too' that is not registered"):
        pickle.loads(stored)


def test_specs_of_the_wrong_types_are_refused() -> None:
    llama = find_architecture("llama")
    assert llama is not None
    for wrong, message in (
        ({"layers": ()}, "layers must be a tuple of at least one LayerSpec"),
        ({"layers": llama.layers[0]}, "layers must be a tuple of at least one LayerSpec"),
        ({"model_types": "mine"}, "model_types must be a tuple of at least one str, got 'mine'"),
        ({"activation": "gelu"}, "activation must be a function, see ArchitectureSpec; got 'gelu'"),
    ):
        with pytest.raises(TypeError, match=message):
            dataclasses.replace(llama, **wrong)
    with pytest.raises(TypeError, match="mlp_block must be a function, see LayerSpec; got None"):
        dataclasses.replace(llama.layers[0], mlp_block=None)
