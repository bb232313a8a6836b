"""``load_adapter``: strict, and all or nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import MeftConfig
from ..engine.layer import ADAPTERS
from ..errors import AdapterFileError, PatchError
from ..patching.patch import Model, check_same_settings, patch_as_saved
from ..patching.state import DEFAULT_ADAPTER, PatchState, find_state, require_state, unwrap
from ..patching.switching import ADAPTER_SETTINGS, activated, add_slot
from ..patching.unfrozen import adopt
from ..rollback import all_or_nothing
from .base_model import are_checksums, check_base, is_fingerprint
from .files import CONFIG_NAME, FORMAT, WEIGHTS_NAME, is_extra_state, read_json, read_shapes, read_tensors, saved_names
from .names import plain_name
from .parts import are_parts, are_tied, check_tied
from .structure import check_structure, found_layers, is_structure
from .vocabulary import embedding_rows

_DOWN = f".{ADAPTERS}.ffn.down.weight"
_RUN_SETTINGS = (
    "engine",
    "impl",
    "reversible_layers",
    "compile_layers",
    "tile",
    "attention",
    "lean_norms",
    "inplace_gradients",
    "remainders",
    "check",
    "loss",
    "loss_rows",
    "inference",
)
"""Settings that change how the numbers are computed and not which; they are not taken from a file."""
_START_SETTINGS = ("down_init_std", "up_init_std")
"""Settings without effect once weights are loaded."""


def load_adapter(
    model: Model,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    probe: Mapping[str, Any] | None = None,
) -> Model:
    """Read what :func:`~meft_kernels.save_adapter` wrote into a model of the same base; patch it if it is not patched.

    Strict: base model, settings, names and shapes must agree, or nothing is changed. Parameters that were trained
    beside the adapters (norms, biases) are trainable again. How a model is run (tiles, remainders, loss, engine) is not
    read: that of a patched model stays, another gets the defaults.

    Args:
        model: a model, patched or not.
        directory: a folder written by ``save_adapter``, by a patched model's ``save_pretrained``, or a checkpoint of a
            ``Trainer``'s.
        adapter_name: the adapter to load into; the active one by default. One that the model does not have is added
            beside the others, and becomes active only with :func:`~meft_kernels.set_adapter`. It may have another rank,
            activation or dropout than they have.
        probe: a batch, keyword arguments of the model's forward, to look at a model without a family file with. None is
            needed: what was found of it is in the folder, and what made-up inputs show is held to that.

    Returns:
        The same object.

    Raises:
        AdapterFileError: files missing, damaged, for another base model or another vocabulary (the message names
            ``resize_token_embeddings``), or with missing or unexpected tensors.
        PatchError: the model is patched with other settings.
        UnsupportedModelError: the model cannot be patched.
    """
    folder = Path(directory)
    description = read_description(folder)
    base = unwrap(model)
    check_base(base, description)
    try:
        config = MeftConfig.from_dict(description["config"])
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{folder / CONFIG_NAME}: {error}") from error
    _check_rank(folder, config)
    state = find_state(model)
    with all_or_nothing(model, () if state is None else state.parts()) as changes:
        if state is None:
            _patch_as_saved(model, folder, config, description, probe)
            state = require_state(model)
            state.active = adapter_name or DEFAULT_ADAPTER
            _load_weights(base, state, folder, description, changes)
            return model
        name = adapter_name or state.active
        if new := name not in state.adapter_names:
            own = _with_own(config, state.config, _RUN_SETTINGS)
            check_same_settings(
                state.config, dataclasses.replace(own, **{s: getattr(state.config, s) for s in ADAPTER_SETTINGS})
            )
            add_slot(model, name, own)
        with activated(model, name):
            if not new:
                check_same_settings(state.config, _with_own(config, state.config, (*_RUN_SETTINGS, *_START_SETTINGS)))
            _load_weights(base, state, folder, description, changes)
        return model


def _patch_as_saved(
    model: nn.Module, folder: Path, config: MeftConfig, description: dict[str, Any], probe: Mapping[str, Any] | None
) -> None:
    """How this process runs the model is its own business: Triton's adapters load without Triton."""
    here = MeftConfig(variant=config.variant, coupling=config.coupling, arithmetic=config.arithmetic)
    try:
        found = found_layers(description.get("structure"))
        patch_as_saved(model, _with_own(config, here, _RUN_SETTINGS), found, probe=probe)
    except ValueError as error:
        raise AdapterFileError(f"{folder / CONFIG_NAME}: {error}") from error


def read_description(folder: Path) -> dict[str, Any]:
    """The checked contents of ``adapter_config.json``.

    Raises:
        AdapterFileError: missing, damaged, or another library's.
    """
    path = folder / CONFIG_NAME
    description = read_json(path)
    if description.get("library") != "meft_kernels":
        raise AdapterFileError(f"{path} was not written by meft_kernels (a PEFT adapter is loaded with PEFT)")
    if description.get("format_version") != FORMAT:
        raise AdapterFileError(f"{path} has format {description.get('format_version')!r}, this version reads {FORMAT}")
    if not isinstance(description.get("config"), dict):
        raise AdapterFileError(f"{path} has no valid 'config'")
    if not is_fingerprint(description.get("base_fingerprint")):
        raise AdapterFileError(f"{path} has no valid 'base_fingerprint'")
    for name in ("base_model_name_or_path", "base_model_class", "model_type"):
        if not isinstance(description.get(name), str):
            raise AdapterFileError(f"{path} has no valid {name!r}")
    labels = description.get("labels")
    if labels is not None and not (
        isinstance(labels, dict)
        and isinstance(labels.get("id2label"), dict)
        and all(key.isdecimal() and isinstance(value, str) for key, value in labels["id2label"].items())
        and isinstance(labels.get("problem_type"), str | None)
    ):
        raise AdapterFileError(f"{path} has no valid 'labels'")
    checks = {"parts": are_parts, "tied": are_tied, "base_checksums": are_checksums, "structure": is_structure}
    for name, is_valid in checks.items():
        if not is_valid(description.get(name)):
            raise AdapterFileError(f"{path} has no valid {name!r}")
    return description


def _check_rank(folder: Path, config: MeftConfig) -> None:
    """Before memory is taken for adapters of whatever rank the settings name."""
    if config.adapters == "none":
        raise AdapterFileError(f"{folder / CONFIG_NAME} says adapters='none': there is nothing to load")
    ranks = {
        shape[0] for key, shape in read_shapes(folder / WEIGHTS_NAME).items() if key.endswith(_DOWN) and len(shape) == 2
    }
    if ranks != {config.rank}:
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} says rank {config.rank}, {WEIGHTS_NAME} holds adapters of rank "
            f"{', '.join(map(str, sorted(ranks))) or 'none'}"
        )


def _with_own(config: MeftConfig, here: MeftConfig, own: tuple[str, ...]) -> MeftConfig:
    """The file's settings, with those named taken from the model that is here."""
    if here.coefficients == config.coefficients:
        own = (*own, "lam", "beta")  # one may name what the other leaves to the defaults
    return dataclasses.replace(config, **{name: getattr(here, name) for name in own})


def _load_weights(
    base: nn.Module, state: PatchState, folder: Path, description: dict[str, Any], changes: all_or_nothing
) -> None:
    check_structure(folder / CONFIG_NAME, description.get("structure"), state)
    path = folder / WEIGHTS_NAME
    found = read_tensors(path)
    parts = description.get("parts") or {}
    names = saved_names(base, state)
    here = {plain_name(name): name for name in base.state_dict()}
    names |= {key: here[key] for key in parts if key in here}
    if missing := sorted((names.keys() | parts.keys()) - found.keys()):
        raise AdapterFileError(f"{path} lacks {len(missing)} tensors that train here, {missing[0]} among them")
    if unexpected := sorted(found.keys() - names.keys()):
        raise AdapterFileError(
            f"{path} has {len(unexpected)} tensors that the model does not, {unexpected[0]} among them"
        )
    check_tied(base, [key for key in names if not is_extra_state(key)], description.get("tied"))
    targets = dict(base.state_dict(keep_vars=True))
    for key, name in names.items():
        _check_tensor(base, path, key, name, found[key], targets[name])
        if parts.get(key) and not isinstance(targets[name], nn.Parameter):
            raise AdapterFileError(f"{folder / CONFIG_NAME} says that {key} trains, which is no parameter")
    changes.keep(targets[name] for key, name in names.items() if not is_extra_state(key))
    frozen = [key for key, trains in parts.items() if not trains]
    other = [key for key in frozen if state.inactive and not _is_equal(targets[names[key]], found[key])]
    adopt(base, state, [names[key] for key, trains in parts.items() if trains or key in other])
    state.brought = tuple(dict.fromkeys((*state.brought, *(names[key] for key in frozen if key not in other))))
    with torch.no_grad():
        for key, name in names.items():
            if is_extra_state(key):
                base.get_submodule(name.rpartition(".")[0]).set_extra_state(found[key])
            else:
                targets[name].copy_(_placed_like(targets[name], found[key]))
    for key, trains in parts.items():
        if trains:
            targets[names[key]].requires_grad_(True)


def _check_tensor(base: nn.Module, path: Path, key: str, name: str, found: torch.Tensor, target: torch.Tensor) -> None:
    if is_extra_state(key):
        try:
            base.get_submodule(name.rpartition(".")[0]).check(found)  # type: ignore[operator]
        except PatchError as error:
            raise AdapterFileError(f"{path}: {error}") from error
    elif found.shape != target.shape:
        rows = found.shape[0] if found.dim() else 0
        way_out = ""
        if target.shape[:1] == (embedding_rows(base),) and found.shape[1:] == target.shape[1:]:
            way_out = f": if tokens were added, call model.resize_token_embeddings({rows}) first"
        elif f".{ADAPTERS}." not in key and found.shape[1:] == target.shape[1:]:
            way_out = f": if it is a task head, load the model with num_labels={rows}"
        raise AdapterFileError(f"{path}: {key} is {tuple(found.shape)}, the model's {tuple(target.shape)}{way_out}")
    elif found.is_floating_point() != target.is_floating_point() or (
        found.itemsize == 1 and found.dtype != target.dtype  # eight bits are no rounding of more
    ):
        raise AdapterFileError(f"{path}: {key} is {found.dtype}, the model's {target.dtype}")
    elif not torch.isfinite(found.float()).all():
        raise AdapterFileError(f"{path}: {key} holds NaN or infinity")


def _is_equal(target: torch.Tensor, found: torch.Tensor) -> bool:
    whole = target.full_tensor() if isinstance(target, DTensor) else target
    return torch.equal(whole, found.to(whole.device, whole.dtype))


def _placed_like(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if not isinstance(target, DTensor):
        return source
    return distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
