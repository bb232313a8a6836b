"""An error at any step of an operation on a model: the model is then what it was, bit for bit, and trains on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels.rollback import all_or_nothing

from .injection import Injected, call_sites, difference, everything, interrupted, same, spread
from .models import TRAINABLE_START, tiny_batch, tiny_bert, train_step

peft = pytest.importorskip("peft")

AT_MOST = 20
"""Interruptions of each operation: where more calls stand in its code, so many of them, evenly spread.

One error comes the first time that such a call is made, Ctrl-C the last time."""


def plain(folder: Path) -> Any:
    return tiny_bert(2, 16)


def patched(folder: Path) -> Any:
    torch.manual_seed(5)
    model = meft_kernels.patch(tiny_bert(2, 16), fraction_bits=16, **TRAINABLE_START).train()
    meft_kernels.save_adapter(model, folder)
    return model


def lora(folder: Path) -> Any:
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny_bert(2, 16), peft.LoraConfig(r=2, target_modules=["query"]))
    return meft_kernels.reversible(model, fraction_bits=16).train().get_base_model()


def two(folder: Path) -> Any:
    model = patched(folder)
    meft_kernels.add_adapter(model, "b", rank=3)
    return model


def cast(folder: Path) -> Any:
    """What comes back must be cast, and the rollback cast it back."""
    return two(folder).double()


OPERATIONS: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Path], object]]] = {
    "patch": (plain, lambda model, folder: meft_kernels.patch(model, rank=3)),
    "unpatch": (patched, lambda model, folder: meft_kernels.unpatch(model)),
    "unpatch from within PEFT": (lora, lambda model, folder: meft_kernels.unpatch(model)),
    "unpatch with two": (two, lambda model, folder: meft_kernels.unpatch(model)),
    "add_adapter": (patched, lambda model, folder: meft_kernels.add_adapter(model, "b")),
    "set_adapter": (two, lambda model, folder: meft_kernels.set_adapter(model, "b")),
    "set_adapter after a cast": (cast, lambda model, folder: meft_kernels.set_adapter(model, "b")),
    "delete_adapter": (two, lambda model, folder: meft_kernels.delete_adapter(model, "b")),
    "save_adapter of another": (
        two,
        lambda model, folder: meft_kernels.save_adapter(model, folder / "b", adapter_name="b"),
    ),
    "load_adapter": (plain, lambda model, folder: meft_kernels.load_adapter(model, folder)),
    "load_adapter into the active": (patched, lambda model, folder: meft_kernels.load_adapter(model, folder)),
    "load_adapter beside it": (patched, lambda model, folder: meft_kernels.load_adapter(model, folder, "c")),
}


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, error: type[BaseException], tmp_path: Path) -> None:
    build, operation = OPERATIONS[name]
    patched(tmp_path)
    operation(build(tmp_path), tmp_path)  # once without a look: Python asks a class only once whether it is a Mapping
    model = build(tmp_path)
    other = build(tmp_path)
    sites = call_sites(lambda: operation(other, tmp_path))
    numbers = sorted({last if error is KeyboardInterrupt else first for first, last in sites})
    batch = tiny_batch(model)
    if name == "load_adapter into the active":
        perturb(model)
    if build is plain:
        model.train()
    gradients = train_step(model, batch)
    model.bert.encoder.layer[0].output.dense.bias.grad = torch.ones(16, dtype=model.dtype)
    before = everything(model)
    for at in spread(numbers, AT_MOST):
        where = interrupted(lambda: operation(model, tmp_path), at, error)
        assert where is not None or name.startswith("save"), f"{name} made fewer calls than {at}"
        now = everything(model)
        assert same(now, before), f"{name} interrupted in {where}: {difference(now, before)}"
    model.bert.encoder.layer[0].output.dense.bias.grad = None
    assert same(train_step(model, batch), gradients)
    operation(model, tmp_path)


def perturb(model: Any) -> None:
    """Other values than those in the file, which an interrupted load must not leave there."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)


def test_what_a_rollback_puts_back() -> None:
    model = tiny_bert(2, 16)
    weight = model.classifier.weight
    weight.grad = torch.ones_like(weight)
    before = everything(model)

    def change() -> None:
        model.bert.extra = torch.nn.Linear(2, 2)
        model.bert.register_forward_hook(print)
        del model.classifier
        weight.data, weight.grad.data = weight.data.bfloat16(), weight.grad.data.bfloat16()
        weight.requires_grad_(False)
        weight.grad = None
        model.forward = print
        model.bert.pooler.dense.bias.data.add_(1)
        raise Injected

    changes = all_or_nothing(model)
    changes.keep([model.bert.pooler.dense.bias])
    with pytest.raises(Injected), changes:
        change()
    now = everything(model)
    assert same(now, before), difference(now, before)
