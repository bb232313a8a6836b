"""``reversible``: what PEFT or the user made trainable, trained without anything of ours, and no trace of us after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import meft_kernels
from meft_kernels import PatchError
from meft_kernels.checkpoint.plain import CALIBRATION_NAME
from meft_kernels.memory import LiveTensorMeter
from meft_kernels.patching.state import find_state, require_state

from ..models import StreamWitness, relative_error, tiny_batch, tiny_llama, train_step, worst_error
from ..test_bad_input import assert_unchanged, fingerprint

peft = pytest.importorskip("peft")

from ..peft_methods import base, wrapped  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
BITS = {"fraction_bits": 18}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(**tiny_batch(base())).logits
    return made


def two_adapters() -> Any:
    """``default`` and ``b``, both of which do something."""
    model = wrapped("LoRA")
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (lambda: base().requires_grad_(False), {}, PatchError, "nothing in this model trains.*is_trainable=True"),
        (base, {"rank": 8, "dropout": 0.1}, ValueError, "inserts no adapters, so dropout, rank has no meaning"),
        (base, {"adapters": "all"}, ValueError, "whatever the setting adapters says"),
        (base, {"modules_to_save": ("lm_head",)}, ValueError, "PEFT's own modules_to_save"),
        (base, {"beta": 0.7}, ValueError, "nearest is 0.5"),
        (lambda: "llama", {}, TypeError, "takes a model"),
    ],
)
def test_wrong_uses(model: Callable[[], Any], settings: dict[str, Any], error: type[Exception], message: str) -> None:
    made = model()
    before = fingerprint(made) if isinstance(made, nn.Module) else None
    with pytest.raises(error, match=message):
        meft_kernels.reversible(made, **settings)
    if before is not None:
        assert_unchanged(made, before)


def test_once_is_enough() -> None:
    model = wrapped("LoRA")
    assert meft_kernels.reversible(model) is model
    assert meft_kernels.reversible(model) is model
    with pytest.raises(PatchError, match="already patched with beta"):
        meft_kernels.reversible(model, beta=-1 / 8)
    with pytest.raises(PatchError, match=r"adapters='all' \(asked for 'none'\)"):
        meft_kernels.reversible(meft_kernels.patch(base()))


def choose(name: str) -> Callable[[Any], Any]:
    def build(model: Any) -> Any:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(name == "everything" or "layers.2" in key or "model.norm" in key)
        return model

    return build


@pytest.mark.parametrize(("part", "layers"), [("top layer and norm", [2]), ("everything", [0, 1, 2])])
def test_any_part_trains(part: str, layers: list[int], tmp_path: Path) -> None:
    """Without PEFT: plain autograd's gradients, nothing kept by layers below what trains, transformers' files."""
    found = []
    for engine in ("reversible", "autograd"):
        model = meft_kernels.reversible(choose(part)(tiny_llama(3, 32)), engine=engine, **BITS).train()
        witness = StreamWitness(model)
        found.append(train_step(model, tiny_batch(model)))
        if engine == "reversible":
            assert sorted(witness.equal) == sorted(witness.nbytes) == layers
            assert all(witness.equal.values())
            model.save_pretrained(tmp_path / "model")
            model.save_pretrained(tmp_path / "checkpoint-3")
            meft_kernels.unpatch(model)
            assert {name for name, p in model.named_parameters() if p.requires_grad} == found[0][1].keys()
    assert found[0][0] == found[1][0]
    assert worst_error(found[0][1], found[1][1], floor=1e-3) <= 1e-5
    names = {}
    for folder in ("model", "checkpoint-3"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names[folder] = set(file.keys())
    assert names["checkpoint-3"] - names["model"] == {"model.layers.0.meft.state._extra_state"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(tiny_llama(3, 32)))


def test_layers_below_what_trains_keep_nothing() -> None:
    kept, elements = [], 4 * 64 * 32
    for layers in (2, 6):
        model = tiny_llama(layers, 32).requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
        meft_kernels.reversible(model, **BITS).train()
        with LiveTensorMeter() as meter:
            loss = model(**tiny_batch(model, 4, 64), use_cache=False).loss
            kept.append(meter.live_bytes)
        loss.backward()
    assert kept[1] - kept[0] < elements, "a byte an element of one layer; checksums and flags are a few more"


CALLS: dict[str, Callable[[Any], Any]] = {
    "set_adapter": lambda model: model.set_adapter("b"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "delete": lambda model: (model.set_adapter("b"), model.delete_adapter("default")),
    "add": lambda model: model.add_adapter("c", peft.LoraConfig(r=2, target_modules=["v_proj"])),
    "merge": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("name", CALLS)
def test_pefts_calls_meanwhile(name: str) -> None:
    """They leave the bits that the same calls before would have."""
    early, late = two_adapters(), meft_kernels.reversible(two_adapters(), **BITS)
    CALLS[name](early)
    if name in ("set_adapter", "delete", "add"):
        meft_kernels.reversible(early, **BITS)
    else:
        meft_kernels.patch(early, adapters="none", **BITS)
    logits(late)
    CALLS[name](late)
    assert torch.equal(logits(late), logits(early))
    if name in ("set_adapter", "delete", "add"):
        batch = tiny_batch(base())
        torch.manual_seed(1)
        assert relative_error(train_step(late.train(), batch)[1], train_step(early.train(), batch)[1]) == 0
    if name == "merge":
        late.unmerge_adapter()
        train_step(late.train(), tiny_batch(base()))


def test_a_disabled_adapter_is_the_reference() -> None:
    """A LoRA that adds nothing gives the very bits of a disabled one: DPO's log-ratios begin at zero."""
    model = meft_kernels.reversible(peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"])), **BITS)
    policy = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), policy)
    trained = meft_kernels.reversible(two_adapters(), **BITS).train()
    loss = trained(**tiny_batch(base())).loss
    with trained.disable_adapter(), torch.no_grad():  # the reference's turn, between forward and backward
        trained(**tiny_batch(base()))
    loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_a_switch_outlives_unpatch() -> None:
    """What trains is PEFT's to say: nothing of before ``reversible`` comes back."""
    model = meft_kernels.reversible(two_adapters())
    model.set_adapter("b")
    meft_kernels.unpatch(model)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"b"}


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_leaving_by_pefts_door(way: str) -> None:
    """No two streams in a merged model."""
    expected = getattr(wrapped("LoRA"), way)()
    model = meft_kernels.reversible(wrapped("LoRA"), **BITS)
    left = getattr(model, way)()
    assert find_state(left) is None
    assert left.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(logits(left), logits(expected))
    assert not [name for name in ("save_pretrained", "load_adapter") if name in vars(model)]

    model = meft_kernels.reversible(wrapped("LoRA"), **BITS)
    layer = model.base_model.model.model.layers[0]
    layer.forward = lambda *args, inner=layer.forward, **kwargs: inner(*args, **kwargs)
    with pytest.raises(PatchError, match="wrapped again after patch"):
        getattr(model, way)()
    assert any("lora_A" in name for name, _ in model.named_parameters())


class Rows:
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in tiny_batch(base(), rows=1, seed=index + 1).items()}


def trainer(model: Any, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def coarse(model: Any) -> Any:
    """Calibrated to other bits than the next process would find, as after an overflow."""
    meft_kernels.reversible(model)
    require_state(model).stacks[0].set_fraction_bits(8)
    return model


@pytest.mark.parametrize("kind", ["lora", "lora by another name", "everything"])
def test_checkpoints_resume_to_the_bit(kind: str, tmp_path: Path) -> None:
    """PEFT's files, or transformers', with the calibration; and the best of them at the end."""

    def build() -> Any:
        if kind != "lora by another name":
            return wrapped("LoRA") if kind == "lora" else base()
        torch.manual_seed(0)
        return peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")

    whole = coarse(build())
    run = trainer(whole, tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    run.train()
    best = Path(str(run.state.best_model_checkpoint))
    expected = {e["step"]: e["loss"] for e in run.state.log_history if "loss" in e}
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / CALIBRATION_NAME).exists() == (kind != "everything")

    resumed = meft_kernels.reversible(build())
    again = trainer(resumed, tmp_path)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert require_state(resumed).stacks[0].arithmetic.fraction_bits == 8
    found = {entry["step"]: entry["loss"] for entry in again.state.log_history if "loss" in entry}
    assert found == expected
    if best.name == "checkpoint-6":
        ours, theirs = dict(resumed.named_parameters()), dict(whole.named_parameters())
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if kind != "everything":
        with pytest.raises(PatchError, match="patched with other settings"):
            meft_kernels.reversible(build(), beta=-1 / 8).load_adapter(checkpoint, "x")
        whole.save_pretrained(str(tmp_path / "adapter"))
        assert not list((tmp_path / "adapter").rglob(CALIBRATION_NAME))
