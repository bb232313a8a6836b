"""What the files of an adapter's folder are called and hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..engine.stack_state import EXTRA_STATE
from ..errors import AdapterFileError, PatchError
from ..patching.state import PatchState, adapter_module_names
from ..patching.unfrozen import unfrozen
from .names import plain_name
from .vocabulary import resized_vocabulary

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"
FORMAT = 1


def saved_names(base: nn.Module, state: PatchState) -> dict[str, str]:
    """Key in the file -> name in ``state_dict()``, of all that trains with the active adapter; keys are plain names.

    Raises:
        PatchError: a layer's adapters are not in ``state_dict()`` under any name known here.
    """
    here = {plain_name(name): name for name in base.state_dict()}
    owned = [plain_name(name) for name in (*adapter_module_names(state), *state.trained_modules)]
    prefixes = [f"{name}." for name in owned]
    names = {key: name for key, name in here.items() if key in owned or key.startswith(tuple(prefixes))}
    for key, prefix in zip(owned, prefixes, strict=True):
        if key not in names and not any(name.startswith(prefix) for name in names):
            raise PatchError(f"no tensors are named {prefix}*: is the layer inside a wrapper? Save the model it wraps")
    names |= {key: here[key] for key in map(plain_name, unfrozen(base, state))}
    return names


def brought_names(base: nn.Module, state: PatchState) -> dict[str, str]:
    """The same of what is frozen and saved with it, because no other base model has it: a resized vocabulary's rows."""
    here = {plain_name(name): name for name in base.state_dict()}
    return {key: here[key] for key in map(plain_name, (*resized_vocabulary(base), *state.brought)) if key in here}


def is_extra_state(key: str) -> bool:
    """Whether a key of ``state_dict()`` is a module's own state, and no parameter or buffer."""
    return key.rpartition(".")[2] == EXTRA_STATE


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        AdapterFileError: no file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterFileError(f"{path.parent} holds no {path.name}: is it a folder written by save_adapter?") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no JSON, integers without end
        raise AdapterFileError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} was not written by meft_kernels: it holds no JSON object")
    return content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by the keys that :func:`saved_names` gives.

    Raises:
        AdapterFileError: see :func:`read_shapes`.
    """
    found: dict[str, torch.Tensor] = _read(path, lambda file, key: file.get_tensor(key))
    return found


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The same tensors' shapes, which the file's head holds.

    Raises:
        AdapterFileError: no file, or damaged, or of another format (a pickle is never opened).
    """
    return _read(path, lambda file, key: tuple(file.get_slice(key).get_shape()))


def _read(path: Path, get: Callable[[Any, str], Any]) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {plain_name(key): get(file, key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise AdapterFileError(f"{path.parent} holds no {path.name}") from None
    except (SafetensorError, ValueError, OSError, RuntimeError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{path} is damaged or no safetensors file: {error}") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file appear as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors makes files that nobody else may read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
