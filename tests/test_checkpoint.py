"""Adapters on disk: round trips, and every way a folder can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import meft_kernels
from meft_kernels import AdapterFileError, PatchError
from meft_kernels.checkpoint.files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from meft_kernels.patching.state import find_state

from .models import TRAINABLE_START, VARIANTS, tiny_batch, tiny_bert, tiny_llama


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved adapter of a tiny BERT, head trained with it."""
    model = meft_kernels.patch(tiny_bert(), **TRAINABLE_START)
    torch.nn.init.normal_(model.classifier.weight)
    model(**tiny_batch(model))
    meft_kernels.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_round_trip(make: Callable[[], Any], variant: str, tmp_path: Path) -> None:
    model = meft_kernels.patch(make(), variant=variant, **TRAINABLE_START)
    batch = tiny_batch(model)
    with torch.no_grad():
        logits = model(**batch).logits
    meft_kernels.save_adapter(model, tmp_path)
    keys = load_file(tmp_path / WEIGHTS_NAME).keys()
    assert {key for key in keys if ".meft." not in key} == (
        {f"{name}.{kind}" for name in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")}
        if make is tiny_bert
        else set()
    )
    again = make()
    assert meft_kernels.load_adapter(again, tmp_path) is again
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, logits)
    # Into a model that is already patched, whose adapters differ.
    torch.manual_seed(99)
    patched = meft_kernels.patch(make(), variant=variant, **TRAINABLE_START)
    meft_kernels.load_adapter(patched, tmp_path)
    with torch.no_grad():
        assert torch.equal(patched(**batch).logits, logits)


def test_fresh_process_gives_the_same_logits(saved: Path, tmp_path: Path) -> None:
    model = tiny_bert()
    meft_kernels.load_adapter(model, saved)
    batch = tiny_batch(model)
    with torch.no_grad():
        torch.save(model(**batch).logits, tmp_path / "logits.pt")
    script = (
        "import sys, torch, meft_kernels\n"
        "from tests.models import tiny_batch, tiny_bert\n"
        "model = meft_kernels.load_adapter(tiny_bert(), sys.argv[1])\n"
        "with torch.no_grad(): logits = model(**tiny_batch(model)).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[2]))\n"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", script, str(saved), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_base_in_another_dtype(saved: Path) -> None:
    model = meft_kernels.load_adapter(tiny_bert().bfloat16(), saved)
    assert torch.isfinite(model(**tiny_batch(model)).logits).all()


def truncated_weights(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def pickle_instead(folder: Path) -> None:
    torch.save({"a": torch.zeros(1)}, folder / WEIGHTS_NAME)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return apply


def change_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        description = json.loads((folder / CONFIG_NAME).read_text())
        for name, value in changes.items():
            if isinstance(value, dict) and isinstance(description.get(name), dict):
                description[name].update(value)
            else:
                description[name] = value
        (folder / CONFIG_NAME).write_text(json.dumps(description))

    return apply


def change_state(change: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: change(tensors[STATE_KEY]))


STATE_KEY = "bert.encoder.layer.0.meft.state._extra_state"
KEY = "bert.encoder.layer.1.meft.ffn.up.weight"
DAMAGE = {
    "no folder": (lambda folder: shutil.rmtree(folder), "holds no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), "holds no adapter_model.safetensors"),
    "truncated weights": (truncated_weights, "damaged or no safetensors"),
    "pickle": (pickle_instead, "damaged or no safetensors"),
    "empty config": (lambda folder: (folder / CONFIG_NAME).write_text(""), "is damaged"),
    "no json object": (lambda folder: (folder / CONFIG_NAME).write_text("[1]"), "not written by meft_kernels"),
    "binary config": (lambda folder: (folder / CONFIG_NAME).write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "peft's": (change_config(library=None), "not written by meft_kernels"),
    "newer format": (change_config(format_version=2), "format 2"),
    "missing key": (change_tensors(lambda tensors: tensors.pop(KEY)), f"lacks 1 tensors that train here, {KEY}"),
    "unexpected key": (change_tensors(lambda tensors: tensors.update(x=torch.zeros(1))), "1 tensors that .*, x among"),
    "wrong shape": (
        change_tensors(lambda tensors: tensors.update({KEY: torch.zeros(64, 9)})),
        r"\(64, 9\), the model's",
    ),
    "other model type": (change_config(model_type="roberta"), "model_type is 'roberta'"),
    "other size": (change_config(hidden_size=128), "hidden_size is 128"),
    "other depth": (change_config(num_hidden_layers=12), "num_hidden_layers is 12"),
    "unknown setting": (change_config(config={"colour": 1}), "unknown settings colour"),
    "huge rank": (change_config(config={"rank": -5}), "rank must be"),
    "text for a number": (change_config(config={"lam": "much"}), "lam must be"),
    "settings no object": (change_config(config=3), "no valid 'config'"),
    "no fingerprint": (change_config(base_fingerprint=None), "no valid 'base_fingerprint'"),
    "odd fingerprint": (change_config(base_fingerprint={"a": ["x"]}), "no valid 'base_fingerprint'"),
    "odd name": (change_config(base_model_name_or_path=["x"]), "no valid 'base_model_name_or_path'"),
    "odd labels": (change_config(labels={"id2label": {"x": 1}}), "no valid 'labels'"),
    "no digits for a key": (change_config(labels={"id2label": {"x": "y"}}), "no valid 'labels'"),
    "other couplings": (change_state(lambda state: state[3].sub_(1).abs_()), "other settings"),
    "no fraction bits": (change_state(lambda state: state[63:].zero_()), "is damaged, or a sum"),
    "NaN for a state": (change_state(lambda state: state.fill_(torch.nan)), "is damaged, or a sum"),
    "odd state": (change_tensors(lambda tensors: tensors.update({STATE_KEY: torch.zeros(3)})), "93 numbers were"),
    "parts no object": (change_config(parts=["x"]), "no valid 'parts'"),
    "parts of nothing": (change_config(parts={"x": True}), "lacks 1 tensors that train here, x among"),
    "parts that cannot train": (change_config(parts={STATE_KEY: True}), "_extra_state trains, which is no parameter"),
    "ties no lists": (change_config(tied={"x": "y"}), "no valid 'tied'"),
    "checksums no numbers": (change_config(base_checksums={"x": ["float32", "y"]}), "no valid 'base_checksums'"),
    "integers for weights": (
        change_tensors(lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int32)})),
        "is torch.int32, the model's torch.float32",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(kind: str, saved: Path) -> None:
    harm, message = DAMAGE[kind]
    harm(saved)
    model = tiny_bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=message):
        meft_kernels.load_adapter(model, saved)
    assert find_state(model) is None
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_damage_leaves_a_patched_model_as_it_was(saved: Path) -> None:
    DAMAGE["missing key"][0](saved)
    model = meft_kernels.patch(tiny_bert(), **TRAINABLE_START)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterFileError):
        meft_kernels.load_adapter(model, saved)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_other_weights_of_the_same_shape(saved: Path) -> None:
    model = tiny_bert()
    torch.manual_seed(123)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with pytest.raises(AdapterFileError, match="trained on other base weights"):
        meft_kernels.load_adapter(model, saved)
    assert find_state(model) is None


def test_other_settings(saved: Path) -> None:
    model = meft_kernels.patch(tiny_bert(), rank=4)
    with pytest.raises(PatchError, match="rank=4"):
        meft_kernels.load_adapter(model, saved)


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
def test_patching_again_with_what_was_loaded_is_no_change(variant: str, tmp_path: Path) -> None:
    model = meft_kernels.patch(tiny_bert(), variant=variant, rank=4)
    meft_kernels.save_adapter(model, tmp_path)
    again = meft_kernels.load_adapter(tiny_bert(), tmp_path)
    assert meft_kernels.patch(again, variant=variant, rank=4) is again
    assert meft_kernels.load_adapter(again, tmp_path) is again
    other = meft_kernels.patch(tiny_bert(), variant=variant, rank=4, lam=-0.125, beta=-0.125)
    with pytest.raises(PatchError, match=r"lam=-0\.125"):
        meft_kernels.load_adapter(other, tmp_path)


def test_nothing_to_save(tmp_path: Path) -> None:
    model = meft_kernels.patch(tiny_bert(), adapters="none")
    with pytest.raises(PatchError, match="no adapters to save"):
        meft_kernels.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_save_replaces_whole_files(saved: Path) -> None:
    model = meft_kernels.load_adapter(tiny_bert(), saved)
    meft_kernels.save_adapter(model, saved)
    assert sorted(path.name for path in saved.iterdir()) == [CARD_NAME, CONFIG_NAME, WEIGHTS_NAME]


def test_the_card_counts_what_was_trained(saved: Path) -> None:
    model = meft_kernels.load_adapter(tiny_bert(), saved)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f" {trained:,} parameters." in (saved / CARD_NAME).read_text(encoding="utf-8")


def test_how_it_was_run_is_not_part_of_an_adapter(tmp_path: Path) -> None:
    model = meft_kernels.patch(tiny_llama(), engine="autograd", reversible_layers=1, **TRAINABLE_START)
    batch = tiny_batch(model)
    with torch.no_grad():
        logits = model(**batch).logits
    meft_kernels.save_adapter(model, tmp_path)
    for other in (tiny_llama(), meft_kernels.patch(tiny_llama(), rank=8, impl="torch")):
        meft_kernels.load_adapter(other, tmp_path)
        assert find_state(other).config.engine == "reversible"
        with torch.no_grad():
            assert torch.equal(other(**batch).logits, logits)


def test_layer_inside_a_wrapper(tmp_path: Path) -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16, **TRAINABLE_START)

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module, name: str) -> None:
            super().__init__()
            setattr(self, name, inner)

    layer = model.model.layers[1]
    model.model.layers[1] = Wrapper(layer, "_orig_mod")
    meft_kernels.save_adapter(model, tmp_path)
    assert sum(".meft." in key for key in load_file(tmp_path / WEIGHTS_NAME)) == 3 * 8 + 1  # and the stack's state
    model.model.layers[1] = Wrapper(layer, "something_else")
    with pytest.raises(PatchError, match=r"no tensors are named model.layers.1.meft"):
        meft_kernels.save_adapter(model, tmp_path)


def test_only_pefts_weights_are_left_to_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import peft

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    meft_kernels.patch(model, **TRAINABLE_START)
    caplog.clear()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    meft_kernels.save_adapter(model, tmp_path)
    assert "6 trainable parameters are PEFT's and were not saved" in caplog.text
    keys = load_file(tmp_path / WEIGHTS_NAME).keys()
    assert {key for key in keys if ".meft." not in key} == {"model.norm.weight"}


def test_others_may_read_what_was_saved(tmp_path: Path) -> None:
    """As far as the user's umask lets them: safetensors itself makes files for their owner alone."""
    meft_kernels.save_adapter(meft_kernels.patch(tiny_llama(), **TRAINABLE_START), tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_head_for_other_classes_says_so(tmp_path: Path) -> None:
    meft_kernels.save_adapter(meft_kernels.patch(tiny_bert(num_labels=2)), tmp_path)
    with pytest.raises(AdapterFileError, match="load the model with num_labels=2"):
        meft_kernels.load_adapter(tiny_bert(num_labels=3), tmp_path)
