"""What an adapter's folder holds of the model itself, beside new modules: which of it trains, which of it is tied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..engine.layer import ADAPTERS
from ..errors import AdapterFileError
from ..patching.state import PatchState
from .names import plain_name


def parts(base: nn.Module, state: PatchState, names: Mapping[str, str]) -> dict[str, bool]:
    """The single tensors among those saved, of which no setting tells, by key, and whether they train."""
    modules = {name for name, _ in base.named_modules()}
    prefixes = tuple(f"{plain_name(name)}." for name in state.trained_modules if name in modules)
    tensors = base.state_dict(keep_vars=True)
    return {
        key: tensors[name].requires_grad
        for key, name in names.items()
        if f".{ADAPTERS}." not in key and not key.startswith(prefixes or ("\0",))
    }


def tied(base: nn.Module, keys: Iterable[str]) -> dict[str, list[str]]:
    """Under which other names the model has these tensors, by key; those that have none are left out."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    groups = {name: group for group in names.values() for name in group if len(group) > 1}
    return {key: sorted(set(groups[key]) - {key}) for key in keys if key in groups}


def check_tied(base: nn.Module, keys: Iterable[str], saved: Any) -> None:
    """Refuse a model in which trained weights stand in other places than they did.

    Raises:
        AdapterFileError: a tensor was tied to another when it was saved and is not here, or the other way round.
    """
    if saved is None:  # a folder of an earlier version
        return
    keys = list(keys)
    here = tied(base, keys)
    for key in keys:
        if here.get(key, []) != saved.get(key, []):
            raise AdapterFileError(
                f"{key} was tied to {_listed(saved.get(key))} when the adapter was saved, and is tied to "
                f"{_listed(here.get(key))} in this model: load the base model with the same tie_word_embeddings"
            )


def are_parts(value: Any) -> bool:
    """Whether a value read from a file is what :func:`parts` gives, or nothing, as in earlier versions' files."""
    return value is None or (isinstance(value, dict) and all(isinstance(trains, bool) for trains in value.values()))


def are_tied(value: Any) -> bool:
    """The same of :func:`tied`."""
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in value.values())
    )


def _listed(names: list[str] | None) -> str:
    return ", ".join(names) if names else "nothing"
