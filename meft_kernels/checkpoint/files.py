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
from ..state import PatchState, adapter_module_names

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"
FORMAT = 1
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile and others put into the names of what they wrap."""


def saved_names(base: nn.Module, state: PatchState) -> dict[str, str]:
    """Key in the file -> name in ``state_dict()``; keys lack the names of wrappers.

    Raises:
        PatchError: a layer's adapters are not in ``state_dict()`` under any name known here.
    """
    parts = [_key(name) for name in (*adapter_module_names(state), *state.trained_modules)]
    prefixes = tuple(f"{part}." for part in parts)
    names = {_key(name): name for name in base.state_dict() if f"{_key(name)}.".startswith(prefixes)}
    for prefix in prefixes:
        if not any(f"{key}.".startswith(prefix) for key in names):
            raise PatchError(f"no tensors are named {prefix}*: is the layer inside a wrapper? Save the model it wraps")
    return names


def is_extra_state(key: str) -> bool:
    """Whether a key of ``state_dict()`` is a module's own state, and no parameter or buffer."""
    return key.rpartition(".")[2] == EXTRA_STATE


def _key(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


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
            return {_key(key): get(file, key) for key in file.keys()}  # noqa: SIM118 - not a dict
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
