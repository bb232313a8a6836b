"""Adapters on disk: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT has it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .config import MeftConfig
from .errors import AdapterFileError, PatchError
from .patching import Model, PatchState, adapter_module_names, find_state, patch, require_state, unpatch, unwrap
from .targets import is_peft
from .verify import fraction_bits_of

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_FORMAT = 1
_RUN_SETTINGS = ("engine", "impl", "reversible_layers")
"""Settings that change how the numbers are computed and not which; they are not taken from a file."""
_START_SETTINGS = ("down_init_std", "up_init_std")
"""Settings without effect once weights are loaded."""
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile and others put into the names of what they wrap."""
_FINGERPRINT_SAMPLES = 16
_FINGERPRINT_TOLERANCE = 2.0**-7
"""Relative; twice bfloat16's rounding, so that a base model may be loaded in another dtype than it was trained in."""


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters, and the modules trained with them, to a folder; the backbone is not copied.

    Raises:
        PatchError: the model is not patched, or has no adapters.
        OSError: the folder cannot be written.
    """
    state = require_state(model)
    base = unwrap(model)
    names = _saved_names(base, state)
    if not names:
        raise PatchError(
            "there are no adapters to save (adapters='none'): save a PEFT model with its own save_pretrained"
        )
    _warn_of_unsaved(base, names.values())
    tensors = dict(base.state_dict(keep_vars=True))
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    payload = {key: tensors[name].detach().to("cpu", copy=True).contiguous() for key, name in names.items()}
    description = {
        "format_version": _FORMAT,
        "library": "meft_kernels",
        "library_version": _library_version(),
        **_describe_base(base),
        # With the coefficients that the config left to this version's defaults.
        "config": dataclasses.replace(state.config, **_coefficients(state.config)).to_dict(),
        "fraction_bits": fraction_bits_of(state),
        "base_fingerprint": _fingerprint(base, names.values()),
    }
    # Each file appears whole or not at all; the config last, so that a folder with one is complete.
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(payload, path, metadata={"format": "pt"}))
    _replace(
        folder / CONFIG_NAME, lambda path: path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    )


def load_adapter(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Read what :func:`save_adapter` wrote into a model of the same base, patching it first if it is not patched.

    Strict: base model, settings, names and shapes must agree, or nothing is changed.

    Returns:
        The same object.

    Raises:
        AdapterFileError: files missing, damaged, for another base model, or with missing or unexpected tensors.
        PatchError: the model is patched with other settings.
        UnsupportedModelError: the model cannot be patched.
    """
    folder = Path(directory)
    description = _read_description(folder)
    base = unwrap(model)
    _check_base(base, description)
    try:
        config = MeftConfig.from_dict(description["config"])
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{folder / CONFIG_NAME}: {error}") from error
    state = find_state(model)
    fresh = state is None
    # How this process runs the model is its own business: an adapter trained with Triton kernels loads without them.
    here = MeftConfig(variant=config.variant, coupling=config.coupling) if state is None else state.config
    own = _RUN_SETTINGS if fresh else (*_RUN_SETTINGS, *_START_SETTINGS)
    if _coefficients(here) == _coefficients(config):
        own = (*own, "lam", "beta")  # one may name what the other leaves to the defaults
    patch(model, dataclasses.replace(config, **{name: getattr(here, name) for name in own}))
    try:
        _load_weights(base, require_state(model), folder, description)
    except BaseException:
        if fresh:
            unpatch(model)
        raise
    return model


def _coefficients(config: MeftConfig) -> dict[str, Any]:
    return dict(zip(("lam", "beta"), config.coefficients, strict=True))


def _saved_names(base: Any, state: PatchState) -> dict[str, str]:
    """Key in the file -> name in ``state_dict()``; keys lack the names of wrappers.

    Raises:
        PatchError: a layer's adapters are not in ``state_dict()`` under any name known here.
    """
    prefixes = [f"{_key(name)}." for name in (*adapter_module_names(state), *state.trained_modules)]
    names = {_key(name): name for name in base.state_dict() if _key(name).startswith(tuple(prefixes))}
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in names):
            raise PatchError(f"no tensors are named {prefix}*: is the layer inside a wrapper? Save the model it wraps")
    return names


def _key(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _warn_of_unsaved(base: Any, names: Any) -> None:
    saved = set(names)
    kept = {id(parameter) for name, parameter in base.named_parameters(remove_duplicate=False) if name in saved}
    left = [
        name for name, parameter in base.named_parameters() if parameter.requires_grad and id(parameter) not in kept
    ]
    if left:
        logger.warning(
            "meft_kernels: %d trainable parameters are neither adapters nor in modules_to_save and were not saved, "
            "%s among them%s",
            len(left),
            left[0],
            ". Save PEFT's with its own save_pretrained, into another folder: the files have the same names"
            if is_peft(base)
            else "",
        )


def _describe_base(base: Any) -> dict[str, Any]:
    config = base.config
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")  # not every family has each of them
    return {
        "base_model_name_or_path": getattr(config, "_name_or_path", "") or "",
        "base_model_class": type(base).__name__,
        "model_type": config.model_type,
        **{name: getattr(config, name, None) for name in sizes},
    }


def _check_base(base: Any, description: dict[str, Any]) -> None:
    trained_on = description.get("base_model_name_or_path") or "unnamed"
    for name, here in _describe_base(base).items():
        saved = description.get(name)
        if name != "base_model_name_or_path" and saved != here:
            raise AdapterFileError(
                f"the adapter does not fit this model: it was trained on one ({trained_on}) whose {name} is {saved!r}, "
                f"here it is {here!r}"
            )
    # Names differ between machines and say little; weights do not lie.
    expected = description["base_fingerprint"]
    tensors = dict(base.named_parameters())
    off = total = 0
    for name, values in expected.items():
        tensor = tensors.get(name)
        if tensor is None or not _sampled(tensor):
            continue  # quantised on this side: nothing to compare
        for here, saved in zip(_samples(tensor), values, strict=True):
            total += 1
            off += not abs(here - saved) <= _FINGERPRINT_TOLERANCE * max(abs(here), abs(saved)) + 1e-6
    if off > 0.02 * total:
        raise AdapterFileError(
            f"the adapter was trained on other base weights ({trained_on}): "
            f"{off} of {total} sampled weights differ from this model's"
        )


def _fingerprint(base: Any, trained: Any) -> dict[str, list[float]]:
    """A few weights of every large frozen matrix."""
    skip = set(trained)
    return {
        name: _samples(parameter)
        for name, parameter in base.named_parameters()
        if name not in skip and not parameter.requires_grad and _sampled(parameter)
    }


def _sampled(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2 and tensor.numel() >= _FINGERPRINT_SAMPLES


def _samples(tensor: torch.Tensor) -> list[float]:
    places = torch.linspace(0, tensor.numel() - 1, _FINGERPRINT_SAMPLES, dtype=torch.float64).long()
    return [float(f"{value:.5g}") for value in tensor.detach().reshape(-1)[places.to(tensor.device)].float().tolist()]


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFileError(f"{folder} holds no {CONFIG_NAME}: is it a folder written by save_adapter?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("library") != "meft_kernels":
        raise AdapterFileError(f"{path} was not written by meft_kernels (a PEFT adapter is loaded with PEFT)")
    if description.get("format_version") != _FORMAT:
        raise AdapterFileError(f"{path} has format {description.get('format_version')!r}, this version reads {_FORMAT}")
    for name, kind in (("config", dict), ("base_fingerprint", dict), ("fraction_bits", list)):
        if not isinstance(description.get(name), kind):
            raise AdapterFileError(f"{path} has no valid {name!r}")
    samples = description["base_fingerprint"].values()
    if not all(
        isinstance(values, list)
        and len(values) == _FINGERPRINT_SAMPLES
        and all(isinstance(v, int | float) for v in values)
        for values in samples
    ):
        raise AdapterFileError(f"{path} has no valid 'base_fingerprint'")
    if not all(bits is None or (isinstance(bits, int) and 0 <= bits <= 28) for bits in description["fraction_bits"]):
        raise AdapterFileError(f"{path} has no valid 'fraction_bits'")
    return description


def _load_weights(base: Any, state: PatchState, folder: Path, description: dict[str, Any]) -> None:
    path = folder / WEIGHTS_NAME
    names = _saved_names(base, state)
    bits = description["fraction_bits"]
    if len(bits) != len(state.stacks):
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} has fraction_bits for {len(bits)} stacks, the model {len(state.stacks)}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (FileNotFoundError, IsADirectoryError):
        raise AdapterFileError(f"{folder} holds no {WEIGHTS_NAME}") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterFileError(f"{path} is damaged or no safetensors file: {error}") from error
    found = {_key(key): tensor for key, tensor in found.items()}
    if missing := sorted(names.keys() - found.keys()):
        raise AdapterFileError(f"{path} lacks {len(missing)} tensors, {missing[0]} among them")
    if unexpected := sorted(found.keys() - names.keys()):
        raise AdapterFileError(
            f"{path} has {len(unexpected)} tensors that the model does not, {unexpected[0]} among them"
        )
    targets = dict(base.state_dict(keep_vars=True))
    for key, name in names.items():
        if found[key].shape != targets[name].shape:
            raise AdapterFileError(
                f"{path}: {key} is {tuple(found[key].shape)}, the model's {tuple(targets[name].shape)}"
            )
    with torch.no_grad():
        for key, name in names.items():
            targets[name].copy_(found[key])
    for stack, fraction_bits in zip(state.stacks, bits, strict=True):
        if fraction_bits is not None and state.config.arithmetic == "exact":
            stack.set_fraction_bits(fraction_bits)


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _library_version() -> str:
    try:
        return version("meft_kernels")
    except PackageNotFoundError:
        return "unknown"
