"""Structures beyond one list, each layer of it called once and in turn: runs, shared layers, towers, other owners."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, PreTrainedModel, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.modeling_outputs import BaseModelOutput

import meft_kernels
from meft_kernels import AdapterFileError, UnsupportedModelError
from meft_kernels.architectures import registry
from meft_kernels.architectures.found import find
from meft_kernels.engine.arithmetic import Arithmetic
from meft_kernels.patching.state import require_state

from ..models import StreamWitness, worst_error
from .exactness import FP32_BOUND, assert_exact, patched, step
from .test_found_refusals import Layer, MadeUp, MadeUpConfig, in_turn, made_up

IDS = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])}


def injects(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    """States go in above the lowest layer."""
    x = model.stack[0](x)
    return model.stack[2](model.stack[1](x + model.words.weight[5]))


def twice(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    return in_turn(model, in_turn(model, x))


class Around(PreTrainedModel):
    """Calls the layers of the model inside it, and not that model."""

    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.inner = MadeUp(config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> Any:
        return BaseModelOutput(last_hidden_state=self.inner.out(in_turn(self.inner, self.inner.words(input_ids))))


def around() -> Around:
    torch.manual_seed(0)
    return Around(MadeUpConfig(vocab_size=30, hidden_size=16)).eval()


def albert() -> AlbertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "embedding_size": 8, "hidden_size": 32, "intermediate_size": 48}
    depth = {"num_hidden_layers": 5, "num_hidden_groups": 2, "num_attention_heads": 4}
    return AlbertForSequenceClassification(AlbertConfig(**sizes, **depth)).eval()


MODELS: dict[str, tuple[Callable[[], Any], list[tuple[int, ...]]]] = {
    "runs": (lambda: made_up(run=injects), [(0,), (1, 2)]),
    "shared": (lambda: made_up(run=twice), [(0, 1, 2, 0, 1, 2)]),
    "albert": (albert, [(0, 0, 0, 1, 1)]),
    "another's layers": (around, [(0, 1, 2)]),
}


@pytest.mark.parametrize(
    ("name", "variant"), [*((name, "meft2") for name in MODELS), ("runs", "meft3"), ("shared", "meft3")]
)
def test_exact(name: str, variant: str) -> None:
    """Rebuilt inputs bit for bit, gradients of plain autograd, near the pretrained model, and no trace afterwards."""
    make, calls = MODELS[name]
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(make(), engine=engine, variant=variant).train()
        stacks = require_state(model).stacks
        assert [stack.calls for stack in stacks] == calls
        witnesses = StreamWitness.on_every_stack(model)
        results.append(step(model, IDS))
        if engine == "reversible":
            assert_exact(witnesses)
            assert [len(witness.equal) for witness in witnesses] == list(map(len, calls))
    (loss, gradients), (expected_loss, expected) = results
    assert loss == expected_loss
    assert all(gradients[key].abs().max() > 0 for key in gradients if ".meft." in key)
    assert worst_error(gradients, expected, floor=1e-3) <= FP32_BOUND
    model = make()
    keys = list(model.state_dict())
    with torch.no_grad():
        before, start, after = (
            next(iter(change(model)(**IDS).values()))
            for change in (lambda model: model, meft_kernels.patch, meft_kernels.unpatch)
        )
    assert torch.equal(before, after) and list(model.state_dict()) == keys and "forward" not in vars(model)
    assert 0 < (before - start).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("name", MODELS)
def test_save_load_copy_and_pickle(name: str, tmp_path: Path) -> None:
    make, _ = MODELS[name]
    model = patched(make())
    with torch.no_grad():
        expected = next(iter(model(**IDS).values()))
        meft_kernels.save_adapter(model, tmp_path)
        for other in (meft_kernels.load_adapter(make(), tmp_path), copy.deepcopy(model)):
            assert torch.equal(next(iter(other(**IDS).values())), expected)
        if name == "albert":
            assert torch.equal(pickle.loads(pickle.dumps(model))(**IDS).logits, expected)
        meft_kernels.add_adapter(model, "second", rank=4)
        meft_kernels.set_adapter(model, "second")
        assert not torch.equal(next(iter(model(**IDS).values())), expected)
        meft_kernels.set_adapter(model, "default")
        assert torch.equal(next(iter(model(**IDS).values())), expected)


def test_a_checkpoint_of_a_lora_has_the_calibration_of_every_run(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    models = [peft.get_peft_model(made_up(run=injects), peft.LoraConfig(target_modules=["mix"])) for _ in range(2)]
    for model in models:
        meft_kernels.reversible(model)
    trained, resumed = (list(require_state(model).stacks) for model in models)
    for stack, bits in zip(trained, (17, 13), strict=True):
        stack.arithmetic = Arithmetic(bits)
    models[0].save_pretrained(tmp_path / "checkpoint-1")
    models[1].load_adapter(str(tmp_path / "checkpoint-1"), "default")
    assert [stack.arithmetic.fraction_bits for stack in resumed] == [17, 13]


def test_a_run_is_told_apart() -> None:
    """Frozen layers and reversible ones are counted through the whole list, from the bottom."""
    model = meft_kernels.patch(made_up(run=injects), reversible_layers=2)
    found = [(s.name, s.layers, s.frozen_layers, s.reversible_layers) for s in meft_kernels.describe(model).stacks]
    assert found == [("stack[0:1]", 1, 0, 1), ("stack[1:3]", 2, 0, 1)]
    report = meft_kernels.verify(model.train(), IDS)
    assert report.bit_exact and report.layers == 2 and report.other_layers == 1
    model = meft_kernels.patch(made_up(run=injects), frozen_layers=1)
    found = [(s.name, s.layers, s.frozen_layers, s.reversible_layers) for s in meft_kernels.describe(model).stacks]
    assert found == [("stack", 3, 1, 2)]
    with pytest.raises(ValueError, match="has 3 layers above the 0 frozen"):
        meft_kernels.patch(made_up(run=injects), reversible_layers=4)
    with pytest.raises(UnsupportedModelError, match="frozen_layers=3 leaves none"):
        meft_kernels.patch(made_up(run=injects), frozen_layers=3)
    assert "6 layers (calls of 3 shared)" in str(meft_kernels.describe(meft_kernels.patch(made_up(run=twice))))
    with pytest.raises(UnsupportedModelError, match="frozen_layers can leave none of them out"):
        meft_kernels.patch(made_up(run=twice), frozen_layers=1)


def test_all_runs_are_calibrated_in_one_pass() -> None:
    model = made_up(run=injects)
    calls: list[int] = []
    model.words.register_forward_hook(lambda *_: calls.append(1))
    meft_kernels.patch(model)
    calls.clear()
    bits = meft_kernels.calibrate(model, IDS)
    assert len(bits) == 2 and None not in bits
    assert len(calls) == 2  # the probe, and the forward itself


def test_calls_of_a_shared_layer_draw_random_numbers_of_their_own() -> None:
    model = patched(albert(), up_init_std=0.0)
    drawn: list[torch.Tensor] = []
    dropout = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.output_dropout
    dropout.p = 0.5
    dropout.register_forward_hook(lambda module, args, output: drawn.append(output.detach() == 0))
    model.train()(**IDS)
    *_, one, two, three = drawn  # the last pass; those before are the calibration's
    assert not torch.equal(one, two) and not torch.equal(two, three)


def test_a_layer_that_is_left_out() -> None:
    """A pass that ends between two runs is none that the streams of the second know of; one within a run is told."""
    model = meft_kernels.patch(made_up(run=injects)).train()
    model(**IDS)
    model.run = lambda model, x: model.stack[1](model.stack[0](x))
    with pytest.raises(meft_kernels.ReversibleUsageError, match=r"returned before stack\.2"):
        model(**IDS)
    model = meft_kernels.patch(made_up(run=twice)).train()
    model(**IDS)
    model.run = in_turn
    with pytest.raises(meft_kernels.ReversibleUsageError, match=r"returned before stack\.2"):
        model(**IDS)
    model.run = lambda model, x: in_turn(model, x.tanh()) + model.stack[1](x)
    with pytest.raises(meft_kernels.ReversibleUsageError, match=r"stack\.1 was called where stack\.0 was due"):
        model(**IDS)


def test_states_that_change_everywhere() -> None:
    def everywhere(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
        return model.stack[2](model.stack[1](model.stack[0](x) + 1) + 1)

    with pytest.raises(UnsupportedModelError, match=r"change between stack\.0 and stack\.1 \(by .*add"):
        meft_kernels.patch(made_up(run=everywhere))


def test_a_family_says_where_streams_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    layers = find(made_up()).layers[0]
    results = []
    for begins in ((1,), (3,), (0,)):
        spec = meft_kernels.LayerSpec(
            layer_class="Layer",
            attention_block=layers.attention_block,
            mlp_block=layers.mlp_block,
            ffn_reads=layers.ffn_reads,
            ffn_writes=layers.ffn_writes,
            begins=lambda config, begins=begins: begins,
        )
        meft_kernels.register_architecture(
            meft_kernels.ArchitectureSpec(model_types=("made_up",), layers=(spec,), activation=lambda config: "silu")
        )
        model = made_up(run=injects)
        if begins == (1,):
            results = [step(patched(model, engine="reversible").train(), IDS)]
            results.append(step(patched(made_up(run=injects), engine="autograd").train(), IDS))
        else:
            with pytest.raises(UnsupportedModelError, match="begins must be ascending indices of layers above the"):
                meft_kernels.patch(model)
    assert results[0][0] == results[1][0]
    assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND


# ------------------------------------------------------------------ towers


class TwoTowers(MadeUp):
    """Pictures may come before the words."""

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.tower = nn.Module()
        self.tower.blocks = nn.ModuleList([Layer() for _ in range(2)])

    def forward(self, input_ids: torch.Tensor, pictures: torch.Tensor | None = None) -> Any:
        x = self.words(input_ids)
        if pictures is not None:
            for block in self.tower.blocks:  # type: ignore[union-attr]
                pictures = block(pictures)
            x = torch.cat([pictures, x], 1)
        return BaseModelOutput(last_hidden_state=self.out(in_turn(self, x)))


def two_towers() -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers(MadeUpConfig(vocab_size=30, hidden_size=16)).eval()


BOTH = {**IDS, "pictures": torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))}


def lists_of(model: nn.Module) -> list[str]:
    return [stack.name for stack in meft_kernels.describe(model).stacks]


@pytest.mark.parametrize(
    ("stacks", "expected"),
    [
        (None, ["stack", "tower.blocks"]),
        (("tower.blocks",), ["tower.blocks"]),
        (("tower",), ["tower.blocks"]),
        (("*block*", "stack"), ["stack", "tower.blocks"]),
    ],
)
def test_stacks_by_name(stacks: tuple[str, ...] | None, expected: list[str], tmp_path: Path) -> None:
    model = patched(two_towers(), stacks=stacks, probe=BOTH)
    assert sorted(lists_of(model)) == expected
    # Loading needs no batch with pictures, of which made-up words show nothing.
    with torch.no_grad():
        wanted = model(**BOTH).last_hidden_state
        meft_kernels.save_adapter(model, tmp_path)
        other = meft_kernels.load_adapter(two_towers(), tmp_path)
        assert torch.equal(other(**BOTH).last_hidden_state, wanted)
    assert sorted(lists_of(other)) == expected


def test_a_tower_that_is_seldom_used_is_calibrated_when_it_is() -> None:
    """Calls that pass it by cost one forward more, the first one, and not each."""
    model = patched(two_towers(), probe=BOTH).train()
    calls: list[int] = []
    model.words.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        model(**IDS)
    assert len(calls) == 4
    assert sorted(bits is None for bits in (s.fraction_bits for s in meft_kernels.describe(model).stacks)) == [
        False,
        True,
    ]
    model(**BOTH).last_hidden_state.mean().backward()
    assert None not in (stack.fraction_bits for stack in meft_kernels.describe(model).stacks)
    assert len(calls) == 6


def test_stacks_that_are_not_there() -> None:
    model = two_towers()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"no list of layers is named vision; there are stack, tower\.blocks"):
        meft_kernels.patch(model, stacks=("stack", "vision"), probe=BOTH)
    with pytest.raises(UnsupportedModelError, match=r"tower\.blocks: its layers were not called by made-up .*probe="):
        meft_kernels.patch(model, stacks=("tower",))
    for wrong in ("stack", (), (3,)):
        with pytest.raises(ValueError, match="stacks"):
            meft_kernels.patch(model, stacks=wrong)
    assert list(model.state_dict()) == before


def t5() -> T5:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    return T5(T5Config(**sizes, decoder_start_token_id=0)).eval()


def test_one_side_of_a_family(tmp_path: Path) -> None:
    batch = {**IDS, "labels": IDS["input_ids"]}
    for side in ("encoder", "decoder"):
        results = []
        for engine in ("reversible", "autograd"):
            model = patched(t5(), engine=engine, stacks=(side,)).train()
            assert lists_of(model) == [f"{side}.block"]
            results.append(step(model, batch))
        assert results[0][0] == results[1][0]
        assert all(name.startswith(side) for name in results[0][1])
        assert worst_error(results[0][1], results[1][1], floor=1e-3) <= FP32_BOUND
    meft_kernels.save_adapter(model, tmp_path)
    assert lists_of(meft_kernels.load_adapter(t5(), tmp_path)) == ["decoder.block"]
    with pytest.raises(meft_kernels.PatchError, match="stacks"):
        meft_kernels.load_adapter(meft_kernels.patch(t5()), tmp_path)
    with pytest.raises(ValueError, match=r"named middle; there are encoder\.block, decoder\.block"):
        meft_kernels.patch(t5(), stacks=("middle",))


# ------------------------------------------------------------------ what an adapter was saved with


def test_other_runs_than_when_it_was_saved(tmp_path: Path) -> None:
    meft_kernels.save_adapter(patched(made_up()), tmp_path)
    for model in (made_up(run=injects), meft_kernels.patch(made_up(run=injects), **_settings(tmp_path))):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            (UnsupportedModelError, AdapterFileError),
            match=r"hidden states change below layer 1|began anew at layers none",
        ):
            meft_kernels.load_adapter(model, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The other way round the streams are read out where they need not be: what is computed is what was trained.
    meft_kernels.save_adapter(model, tmp_path)
    loaded = meft_kernels.load_adapter(made_up(), tmp_path)
    assert [stack.calls for stack in require_state(loaded).stacks] == [(0,), (1, 2)]


def _settings(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    return {name: config[name] for name in ("rank", "up_init_std")}


def _change(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    change(content["structure"][0])
    path.write_text(json.dumps(content))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another FFN": (
        lambda s: s["found"]["kinds"][0].update(ffn=["mix", "mix"]),
        r"stack: the FFN of Layer is \('rise'",
    ),
    "a part less": (lambda s: s["found"]["kinds"][0].update(ffn=["up", "fall"]), r"stack\.0 has no part up"),
    "another class": (lambda s: s["found"]["kinds"][0].update({"class": "Block"}), r"stack\.0 is a Layer of other"),
    "more layers": (lambda s: s["found"].update(calls=[0, 1, 2, 3]), r"number of layers is 3, and was 4"),
    "another list": (
        lambda s: (s.update(list="blocks"), s["found"].update(list="blocks")),
        "holds no list of layers blocks",
    ),
    "another width": (
        lambda s: s["found"].update(hidden_size=10**9),
        r"stack\.0 has no weight of the width 1000000000",
    ),
    "endless": (lambda s: s["found"].update(layerdrop=10**400), "no valid 'structure'"),
    "damaged": (lambda s: s["found"].update(kinds=3), "no valid 'structure'"),
    "no list": (lambda s: s.update(begins=None), "no valid 'structure'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_than_it_was_saved_of(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    meft_kernels.save_adapter(patched(made_up()), tmp_path)
    _change(tmp_path, change)
    model = made_up()
    with pytest.raises((UnsupportedModelError, AdapterFileError), match=message):
        meft_kernels.load_adapter(model, tmp_path)
    assert not any("meft" in key for key in model.state_dict())


def test_a_model_that_takes_no_made_up_inputs_is_loaded_without_a_batch(tmp_path: Path) -> None:
    def make() -> MadeUp:
        model = made_up()
        model.forward = lambda words: MadeUp.forward(model, words)  # type: ignore[method-assign]
        return model

    batch = {"words": IDS["input_ids"]}
    model = patched(make(), probe=batch)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        meft_kernels.save_adapter(model, tmp_path)
        assert torch.equal(meft_kernels.load_adapter(make(), tmp_path)(**batch).last_hidden_state, expected)
        loaded = meft_kernels.load_adapter(make(), tmp_path, probe=batch)
        assert torch.equal(loaded(**batch).last_hidden_state, expected)
