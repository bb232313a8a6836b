"""Several adapters for one model: adding, switching, deleting, and leaving them out for a while."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..config import MeftConfig
from ..errors import PatchError
from ..modules import modules_of
from ..notices import warn_once
from ..rollback import all_or_nothing
from .insertion import make_adapters
from .state import AdapterSlot, PatchState, between_passes, dtype_beside, require_state, unwrap
from .targets import find_spec
from .unfrozen import adopt_unfrozen, unfrozen

logger = logging.getLogger(__name__)

ADAPTER_SETTINGS = (
    "rank", "activation", "dropout", "down_init_std", "up_init_std", "adapter_dtype", "fraction_bits"
)  # fmt: skip
"""Settings in which the adapters of one model may differ; the others are the model's."""


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's adapters, the active one first.

    Raises:
        PatchError: the model is not patched.
    """
    return require_state(model).adapter_names


def add_adapter(model: nn.Module, adapter_name: str, **settings: Any) -> None:
    """Add an untrained adapter beside those that the model has; :func:`set_adapter` makes it the active one.

    Modules trained with the adapters (a task head) belong to each: the new one starts with a copy of the active one's.

    Args:
        model: a patched model.
        adapter_name: of the new adapter. The one that ``patch`` inserted is called ``"default"``.
        **settings: ``rank``, ``activation``, ``dropout``, ``down_init_std``, ``up_init_std``, ``adapter_dtype`` and
            ``fraction_bits``, where they are not to be the active adapter's.

    Raises:
        PatchError: the model is not patched, has no adapters, or has one of this name; or a setting is the model's.
        ValueError: a setting is out of range. Nothing has been changed when an error is raised.
    """
    state = require_state(model)
    if not isinstance(adapter_name, str) or not adapter_name:
        raise ValueError(f"an adapter's name is a string that is not empty, not {adapter_name!r}")
    if adapter_name in state.adapter_names:
        raise PatchError(f"there is an adapter {adapter_name!r} already; the model has {_listed(state)}")
    if others := sorted(settings.keys() - set(ADAPTER_SETTINGS)):
        raise PatchError(
            f"{', '.join(others)} cannot differ between the adapters of one model; {', '.join(ADAPTER_SETTINGS)} can"
        )
    add_slot(model, adapter_name, dataclasses.replace(state.config, **settings))


def add_slot(model: nn.Module, adapter_name: str, config: MeftConfig) -> None:
    """The same with complete settings, known to fit the model."""
    state, base = require_state(model), unwrap(model)
    if config.adapters == "none":
        raise PatchError("the model was patched with adapters='none' and has no place for one")
    _check_may_switch(model, state)
    spec = state.found or find_spec(base, config)  # of a patched model nothing could be found
    layers = [
        [make_adapters(layer.module, stack.spec, stack.hidden_size, base, spec, config) for layer in stack.layers]
        for stack in state.stacks
    ]
    with all_or_nothing(base, state.parts()):
        adopt_unfrozen(base, state)
        state.inactive[adapter_name] = AdapterSlot(
            config,
            layers,
            deepcopy(trained_tensors(base, state)),
            [stack.given_arithmetic(config) for stack in state.stacks],
            [dtype_beside(stack) for stack in state.stacks],
        )


@between_passes
def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make this adapter the active one: the one that computes, trains, and is in ``state_dict()``.

    Parameters of the others leave the model unchanged and come back as the same objects, so that each adapter may have
    an optimizer of its own. One that comes back is moved and cast as the model was meanwhile. A forward made before
    must have its backward before the switch, or backward raises. It is the active one for all threads: passes of others
    under way are waited for, and theirs then wait.

    Raises:
        PatchError: the model is not patched, or has no adapter of this name. Nothing has been changed when this or any
            other error is raised.
        ReversibleUsageError: in the middle of a forward pass of this thread.
    """
    state, base = require_state(model), unwrap(model)
    if adapter_name == state.active:
        return
    if adapter_name not in state.inactive:
        raise PatchError(f"there is no adapter {adapter_name!r}; the model has {_listed(state)}")
    _check_may_switch(model, state)
    with all_or_nothing(base, state.parts()):
        adopt_unfrozen(base, state)
        coming = state.inactive.pop(adapter_name)
        leaving = trained_tensors(base, state)
        state.inactive[state.active] = AdapterSlot(
            state.config,
            [[layer.adapters for layer in stack.layers] for stack in state.stacks],
            leaving,
            [stack.arithmetic for stack in state.stacks],
            [dtype_beside(stack) for stack in state.stacks],
        )
        for index, stack in enumerate(state.stacks):
            dtype = dtype_beside(stack)
            cast = dtype if dtype != coming.beside[index] else None
            stack.take_up(coming.config, coming.arithmetics[index])
            for layer, adapters in zip(stack.layers, coming.layers[index], strict=True):
                device = next(iter(layer.adapters.values())).up.weight.device
                layer.hold({n: a.to(device, cast).train(layer.module.training) for n, a in adapters.items()})
        _put(base, {id(old): _placed_like(old, coming.heads[name]) for name, old in leaving.items()})
        state.config, state.active = coming.config, adapter_name


def trained_tensors(base: nn.Module, state: PatchState) -> dict[str, torch.Tensor]:
    """Parameters and buffers of what is trained beside the adapters, by name; each once, whatever shares it."""
    if not state.trained_modules:
        return {}
    prefixes = tuple(f"{name}." for name in state.trained_modules)
    found = {
        id(tensor): (name, tensor)
        for tensors in (base.named_parameters(remove_duplicate=False), base.named_buffers(remove_duplicate=False))
        for name, tensor in tensors
        if name in state.trained_modules or name.startswith(prefixes)
    }
    return dict(found.values())


def _put(base: nn.Module, others: dict[int, torch.Tensor]) -> None:
    """Put other tensors in the place of the model's own, which are named by their ids, wherever these are."""
    for module in modules_of(base) if others else ():
        held: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for tensors in held:
            tensors.update({name: others[id(t)] for name, t in tensors.items() if id(t) in others})


def _placed_like(here: torch.Tensor, coming: torch.Tensor) -> torch.Tensor:
    """A tensor moved and cast to where another is, as a module's are: a parameter remains the same object."""
    if (coming.device, coming.dtype) == (here.device, here.dtype):
        return coming
    holder = nn.Module()
    if isinstance(coming, nn.Parameter):
        holder.it = coming
    else:
        holder.register_buffer("it", coming)
    moved: Any = holder.to(here.device, here.dtype if here.is_floating_point() else None).it
    return moved


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Drop an adapter that is not the active one.

    Raises:
        PatchError: the model is not patched, has no adapter of this name, or it is active.
    """
    state = require_state(model)
    if adapter_name == state.active:
        raise PatchError(
            f"{adapter_name!r} is the active adapter: set_adapter to another first, or unpatch the model to drop all"
        )
    if adapter_name not in state.inactive:
        raise PatchError(f"there is no adapter {adapter_name!r}; the model has {_listed(state)}")
    del state.inactive[adapter_name]


@contextmanager
def activated(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Inside a ``with`` block another adapter is the active one."""
    state = require_state(model)
    before = state.active
    with all_or_nothing(unwrap(model), state.parts()):
        set_adapter(model, adapter_name)
        yield
        set_adapter(model, before)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside a ``with`` block the model computes what it did, frozen, before :func:`patch`: DPO's reference, say.

    Bit for bit: adapters and coupling are out of the way. What trains beside them (a task head, norms) stays as it is;
    of parameters that were pretrained, a warning tells. It holds for this thread, and for forwards: the backward of one
    made outside of the block has its adapters inside, too.

    Raises:
        PatchError: the model is not patched.
    """
    state = require_state(model)
    if changed := _pretrained_that_train(unwrap(model), state):
        warn_once(
            logger,
            f"meft_kernels: disable_adapter leaves out adapters, and not what trains beside them ({changed[0]} among "
            f"{len(changed)} parameters): it is not the pretrained model that computes",
        )
    with ExitStack() as bypasses:
        for stack in state.stacks:
            bypasses.enter_context(stack.bypass())
        yield


def _pretrained_that_train(base: nn.Module, state: PatchState) -> list[str]:
    """Single parameters that train beside the adapters, norms and biases say; heads are no part of what was loaded."""
    inside = {id(parameter) for stack in state.stacks for parameter in stack.owner.parameters()}
    named = dict(base.named_parameters())
    owned = [name for name in state.trained_modules if name in named and id(named[name]) in inside]
    return [*owned, *unfrozen(base, state)]


def _check_may_switch(model: nn.Module, state: PatchState) -> None:
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    sharded = any(isinstance(p, DTensor) for stack in state.stacks for p in stack.layers[0].module.parameters())
    if wrapped or sharded:
        raise PatchError(
            "adapters cannot be added or switched inside DistributedDataParallel or fully_shard, which have taken hold "
            "of the parameters: do it before wrapping"
        )


def _listed(state: PatchState) -> str:
    return ", ".join(map(repr, state.adapter_names))
