"""Parameters of the model that somebody made trainable after ``patch``: norms, biases, embeddings.

They belong to the adapter that they train with, as its task head does: each of several adapters has its own, and they
are saved and loaded with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from torch import nn

from ..architectures.layer_lists import is_peft
from ..engine.layer import ADAPTERS
from ..errors import PatchError
from .state import PatchState


def unfrozen(base: Any, state: PatchState) -> dict[str, nn.Parameter]:
    """Parameters that train and that no adapter owns yet, by name; a tied one once.

    PEFT's are not among them: those that it left trainable before ``patch``, and what is inside of its own modules.
    """
    if state.config.adapters == "none":
        return {}
    known = {id(parameter) for parameter in _owned(base, state)}
    if is_peft(base):
        known |= {id(parameter) for parameter in _pefts(base, state)}
    return {
        name: parameter
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and id(parameter) not in known
    }


def adopt(base: nn.Module, state: PatchState, names: Iterable[str]) -> None:
    """Have these tensors of the model belong to the adapters: the others go on with copies of their own."""
    new = [name for name in names if name not in state.trained_modules]
    tensors = base.state_dict(keep_vars=True)
    for slot in state.inactive.values():
        slot.heads.update({name: deepcopy(tensors[name]) for name in new})
    state.trained_modules = (*state.trained_modules, *new)


def adopt_unfrozen(base: nn.Module, state: PatchState) -> None:
    """The same with what was made trainable since the last time.

    Raises:
        PatchError: there are other adapters already, whose values of them may have been overwritten.
    """
    new = list(unfrozen(base, state))
    if new and state.inactive:
        raise PatchError(
            f"{len(new)} parameters, {new[0]} among them, were made trainable while the model had several adapters, "
            f"each of which needs its own. Make them trainable before add_adapter and load_adapter, freeze them again "
            f"(requires_grad_(False)), or delete_adapter the others ({', '.join(state.inactive)})"
        )
    adopt(base, state, new)


def _owned(base: nn.Module, state: PatchState) -> Iterable[nn.Parameter]:
    for stack in state.stacks:
        for layer in stack.layers:
            yield from layer.module.get_submodule(ADAPTERS).parameters()
    prefixes = tuple(f"{name}." for name in state.trained_modules)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if name in state.trained_modules or name.startswith(prefixes):
            yield parameter


def _pefts(base: nn.Module, state: PatchState) -> Iterable[nn.Parameter]:
    yield from (parameter for name, parameter in base.named_parameters() if state.required_grad.get(name, False))
    for module in base.modules():
        if type(module).__module__.partition(".")[0] == "peft":
            yield from module.parameters()
