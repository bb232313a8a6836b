"""What of a layer is found once: never what it was before the last change, and the same object while there is none."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from meft_kernels.engine.inventory import Inventories, Inventory, copied, hook_changes, hooks_below
from meft_kernels.modules import Parts, modules_of

from .models import pair, tiny_batch, train_step, worst_error


def made() -> nn.Module:
    layer = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    layer[0].requires_grad_(False)
    return layer


def held(inventory: Inventory) -> tuple[object, ...]:
    """All that it says, by identity."""
    places = [(id(where), name, id(leaf)) for where, name, leaf in inventory.places]
    buffers = [(id(where), name, id(buffer)) for where, name, buffer in inventory.buffers]
    lists = (inventory.parts, inventory.trained, inventory.leaves, inventory.parameters)
    return places, buffers, *([id(each) for each in some] for some in lists)


def _exchanged(layer: nn.Module) -> None:
    """Two modules of one kind change places: as many of the same names as before."""
    layer[0], layer[1][0] = layer[1][0], layer[0]


def _renamed(layer: nn.Module) -> None:
    layer[0]._parameters = {"w" if name == "weight" else name: p for name, p in layer[0]._parameters.items()}


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a parameter replaced": lambda layer: setattr(layer[1][0], "weight", nn.Parameter(torch.zeros(4, 4))),
    "a parameter taken away": lambda layer: setattr(layer[1][0], "bias", None),
    "a parameter added": lambda layer: layer.register_parameter("more", nn.Parameter(torch.zeros(1))),
    "a parameter under another name": _renamed,
    "a parameter thawed": lambda layer: layer[0].weight.requires_grad_(),
    "a parameter frozen": lambda layer: layer[1][0].weight.requires_grad_(False),
    "a buffer replaced": lambda layer: setattr(layer[1][1], "running_mean", torch.zeros(4)),
    "a buffer that is trained": lambda layer: layer[1][1].running_mean.requires_grad_(),
    "a module replaced": lambda layer: setattr(layer[1], "0", nn.Linear(4, 4)),
    "a module added": lambda layer: layer[1].append(nn.Linear(4, 4)),
    "a module taken away": lambda layer: layer[1].pop(1),
    "modules exchanged": _exchanged,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(change: Callable[[nn.Module], object]) -> None:
    layer, inventories = made(), Inventories()
    before = inventories.of(layer)
    assert inventories.of(layer) is before
    change(layer)
    after = inventories.of(layer)
    assert after is not before
    assert held(after) == held(Inventories().of(layer))
    assert inventories.of(layer) is after


def test_equal_modules_are_not_the_same() -> None:
    class Alike(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Alike)

        __hash__ = nn.Linear.__hash__

    layer, parts = nn.Sequential(Alike(2, 2)), Parts()
    parts.of(layer)
    layer[0] = Alike(2, 2)
    assert parts.of(layer)[1] is layer[0]


def test_what_somebody_computed_is_not_kept() -> None:
    """``functional_call`` with computed tensors: the next call finds its own, and nothing holds the graph."""
    layer, inventories = made(), Inventories()
    layer[1][0]._parameters["weight"] = computed = layer[1][0].weight * 2  # type: ignore[assignment]
    found = inventories.of(layer)
    assert any(tensor is computed for tensor in found.trained)
    assert inventories.of(layer) is not found
    assert inventories._last is None


def test_copies_find_their_own() -> None:
    layer, inventories = made(), Inventories()
    inventories.of(layer)
    for twin in (copy.deepcopy(inventories), pickle.loads(pickle.dumps(inventories))):
        other = copy.deepcopy(layer)
        assert twin.of(other).parts == modules_of(other)


def test_hooks_as_they_were() -> None:
    layer = made()
    first = layer[1].register_forward_hook(print)
    before = copied(hooks_below(modules_of(layer)))
    assert hook_changes(before, hooks_below(modules_of(layer))) == []
    first.remove()
    layer[0].register_forward_pre_hook(print, with_kwargs=True)
    for where, kind, value in hook_changes(before, hooks_below(modules_of(layer))):
        where[kind] = value
    assert hooks_below(modules_of(layer)) == before


@pytest.mark.parametrize("change", ["thaw", "replace"])
def test_a_layer_that_changes_between_steps(change: str) -> None:
    """A step with all that was found before, a change, and a step with what is there now: gradients are autograd's."""
    found = []
    for model in pair("llama"):
        batch = tiny_batch(model)
        train_step(model, batch)
        mlp = model.model.layers[1].mlp
        if change == "thaw":
            mlp.up_proj.weight.requires_grad_()
        else:
            torch.manual_seed(3)
            mlp.down_proj = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features)
        found.append(train_step(model, batch)[1])
    assert found[0].keys() == found[1].keys()
    assert any("mlp" in name and "meft" not in name for name in found[0])
    assert worst_error(*found) <= 1e-5
