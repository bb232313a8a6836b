"""What a patched model carries with it: its settings, its stacks, its adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures.found import FoundArchitecture
from ..config import MeftConfig
from ..engine.adapters import Adapter
from ..engine.arithmetic import Arithmetic
from ..engine.layer import ADAPTERS
from ..engine.stack import ReversibleStack
from ..errors import PatchError
from ..modules import modules_of

if TYPE_CHECKING:
    from ..planning import Plan

Change = TypeVar("Change", bound=Callable[..., Any])

STATE = "_meft_state"
"""Attribute of the transformers model under which :class:`PatchState` is kept."""
DEFAULT_ADAPTER = "default"


@dataclass
class AdapterSlot:
    """One adapter while another is in the model: its settings, its weights, and the calibration it was trained with."""

    config: MeftConfig
    layers: list[list[dict[str, Adapter]]]
    """Of every stack, of every patched layer."""
    heads: dict[str, torch.Tensor]
    """Parameters and buffers of what is trained with it, by name."""
    arithmetics: list[Arithmetic | None]
    """Of every stack."""
    beside: list[torch.dtype | None]
    """Of every stack: what its pretrained layers were in when this adapter left the model."""

    def parts(self) -> list[object]:
        """Itself, all modules, and the tensors that are in none of them."""
        adapters = (adapter for stack in self.layers for layer in stack for adapter in layer.values())
        return [self, *(part for adapter in adapters for part in modules_of(adapter)), *self.heads.values()]


class Binding(Protocol):
    """Something bound on the model, to be taken off again."""

    def remove(self, model: nn.Module) -> None: ...


@dataclass
class PatchState:
    """What :func:`~meft_kernels.patch` did to a model."""

    config: MeftConfig
    """Settings of the active adapter."""
    stacks: list[ReversibleStack]
    trained_modules: tuple[str, ...]
    """Modules, and parameters that are in none of them, trained and saved whole beside the adapters."""
    required_grad: dict[str, bool]
    """``requires_grad`` of every parameter before."""
    active: str = DEFAULT_ADAPTER
    """Name of the adapter that is in the model."""
    inactive: dict[str, AdapterSlot] = field(default_factory=dict)
    """The others, by name."""
    bindings: list[Binding] = field(default_factory=list)
    """What was bound on the model besides its layers' forwards."""
    brought: tuple[str, ...] = ()
    """Frozen tensors that came from an adapter's folder (rows of a resized vocabulary), by name: the model's, and saved
    with its adapters again."""
    found: FoundArchitecture | None = None
    """What was found of a model without a family file: patched, it is not looked at again."""
    plan: Plan | None = None
    """How the settings were chosen, where a budget was given."""
    around: tuple[nn.Module, ...] = ()
    """Modules around the model on which something is bound: PEFT's wrapper and its tuner."""

    def decides_on(self, name: str) -> bool:
        """Whether ``patch`` has decided if this parameter trains. Otherwise PEFT does, or the user."""
        if self.config.adapters == "all" and not self.stacks[0].under_peft:
            return True
        return any(name == part or name.startswith(f"{part}.") for part in self.trained_modules)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of all adapters, the active one first."""
        return self.active, *self.inactive

    def parts(self) -> list[object]:
        """All that belongs to the patched model and is not a part of it: our own objects, and adapters that wait."""
        stacks = [part for stack in self.stacks for part in stack.parts()]
        waiting = [part for slot in self.inactive.values() for part in slot.parts()]
        return [self, *stacks, *self.bindings, *self.around, *waiting]


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT, DDP or ``torch.compile`` wrapper, or a model of sentence-transformers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = _inside_peft(model)
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif is_sentence_encoder(model) and model.transformers_model is not None:
            model = model.transformers_model
        else:
            return model


def peft_wrapper(model: Any) -> Any:
    """PEFT's wrapper around the model, inside of DDP's or ``torch.compile``'s perhaps; None if it has none."""
    while not hasattr(model, "get_base_model"):
        distributed = isinstance(model, nn.parallel.DistributedDataParallel)
        inner = model.module if distributed else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def _inside_peft(model: Any) -> Any:
    try:
        return model.get_base_model()
    except KeyError:  # it asks the active adapter how it is built in, and that one was deleted
        inner = model.base_model
        return inner if isinstance(inner, PreTrainedModel) else inner.model


def is_sentence_encoder(model: Any) -> bool:
    """Whether this is a model of sentence-transformers: modules around a transformer, and a head perhaps."""
    return any(kind.__module__.startswith("sentence_transformers.") for kind in type(model).__mro__) and hasattr(
        model, "transformers_model"
    )


def find_state(model: nn.Module) -> PatchState | None:
    """What :func:`~meft_kernels.patch` did to the model, None if it did nothing."""
    return getattr(unwrap(model), "__dict__", {}).get(STATE)  # a wrapper may hand out its inner model's attributes


def require_state(model: nn.Module) -> PatchState:
    """The same, where there must be something.

    Raises:
        PatchError: the model is not patched.
    """
    state = find_state(model)
    if state is None:
        parts = model.named_modules() if isinstance(model, nn.Module) else ()
        inside = next((name for name, part in parts if STATE in vars(part)), None)
        raise PatchError(
            "this model is not patched: call meft_kernels.patch(model) first"
            if inside is None
            else f"this model is not patched, but its part {inside} is: give that one, model.get_submodule({inside!r})"
        )
    return state


def between_passes(change: Change) -> Change:
    """Decorates a function that changes what all threads' passes through a patched model, its first argument, read.

    The function then runs while no other thread is in a forward pass through the model, and none begins.
    """

    @functools.wraps(change)
    def waiting(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with require_state(model).stacks[0].gate.changing():
            return change(model, *args, **kwargs)

    return cast(Change, waiting)


def dtype_beside(stack: ReversibleStack) -> torch.dtype | None:
    """Of a stack's pretrained layers, beside their adapters; None where nothing in them is floating point."""
    named = stack.layers[0].module.named_parameters()
    return next((p.dtype for name, p in named if p.is_floating_point() and not name.startswith(f"{ADAPTERS}.")), None)


def adapter_module_names(state: PatchState) -> list[str]:
    """Qualified names of the modules that hold adapters."""
    if state.config.adapters == "none":
        return []
    return [f"{layer.name}.{ADAPTERS}" for stack in state.stacks for layer in stack.layers]


def fraction_bits_of(state: PatchState) -> tuple[int | None, ...]:
    """K of every stack, None where streams are float or not calibrated yet."""
    return tuple(stack.arithmetic.fraction_bits if stack.arithmetic is not None else None for stack in state.stacks)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total
