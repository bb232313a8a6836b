"""``save_adapter``."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import PatchError
from ..patching.state import require_state, unwrap
from ..patching.switching import activated
from .base_model import checksums, describe_base, describe_labels, fingerprint, frozen_tensors
from .card import model_card
from .files import CARD_NAME, CONFIG_NAME, FORMAT, WEIGHTS_NAME, brought_names, is_extra_state, saved_names, write_whole
from .parts import parts, tied
from .structure import structure_of

logger = logging.getLogger(__name__)


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter, and all that trains with it, to a folder; the backbone is not copied.

    What trains with it are the task head or ``modules_to_save``, and every other parameter of the model that was made
    trainable (norms, biases). Where the model's vocabulary is not of the published model's size, its embeddings go into
    the folder as well.

    Beside the weights and the settings, a model card (``README.md``) makes the folder ready for the hub; one that is
    there already is kept. With several processes all may call this, and under FSDP2 all must; the first one writes.

    Args:
        model: a patched model.
        directory: the folder, made if it is not there.
        adapter_name: which of several adapters; the active one by default.
        state_dict: where to take the weights from instead of the model (gathered from other processes, say).

    Raises:
        PatchError: the model is not patched, or has no adapters, or none of this name; or another is asked for than the
            active one, and parameters were made trainable after it was added.
        OSError: the folder cannot be written.
    """
    state = require_state(model)
    base = unwrap(model)
    with activated(model, state.active if adapter_name is None else adapter_name):
        names = saved_names(base, state)
        if not names:
            raise PatchError(
                "there are no adapters to save (adapters='none'): save a PEFT model with its own save_pretrained"
            )
        trained = frozenset(names)
        names |= brought_names(base, state)
        _warn_of_pefts(base, names.values())
        tensors = base.state_dict(keep_vars=True) if state_dict is None else state_dict
        if missing := [name for name in names.values() if name not in tensors]:
            raise PatchError(f"state_dict lacks {len(missing)} of the adapter's tensors, {missing[0]} among them")
        weights = {key: _whole(tensors[name]) for key, name in names.items()}
        frozen = frozen_tensors(base, names.values())
        lam, beta = state.config.coefficients
        description = {
            "format_version": FORMAT,
            "library": "meft_kernels",
            "library_version": library_version(),
            **describe_base(base),
            # With the coefficients that the config left to this version's defaults.
            "config": dataclasses.replace(state.config, lam=lam, beta=beta).to_dict(),
            "structure": structure_of(state),
            "labels": describe_labels(base),
            "parts": parts(base, state, names),
            "tied": tied(base, names),
            "base_fingerprint": fingerprint(frozen),
            "base_checksums": checksums(frozen),
        }
    if not writes():
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # The config last, so that a folder with one is complete.
    write_whole(folder / WEIGHTS_NAME, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    if not (folder / CARD_NAME).exists():
        # The calibration is in the file as well, and rows of the vocabulary may be.
        parameters = sum(weights[key].numel() for key in trained if not is_extra_state(key))
        card = model_card(description, parameters)
        write_whole(folder / CARD_NAME, lambda path: path.write_text(card, encoding="utf-8"))
    text = json.dumps(description, indent=2) + "\n"
    write_whole(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def is_distributed() -> bool:
    """Whether there are other processes, which take part in gathering weights."""
    return dist.is_available() and dist.is_initialized()


def writes() -> bool:
    """Whether this process is the one that writes files."""
    return not is_distributed() or dist.get_rank() == 0


def library_version() -> str:
    """This library's version, as installed."""
    try:
        return version("meft_kernels")
    except PackageNotFoundError:
        return "unknown"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True).contiguous()


def _warn_of_pefts(base: nn.Module, names: Iterable[str]) -> None:
    saved = set(names)
    kept = {id(parameter) for name, parameter in base.named_parameters(remove_duplicate=False) if name in saved}
    left = [
        name for name, parameter in base.named_parameters() if parameter.requires_grad and id(parameter) not in kept
    ]
    if left:
        logger.warning(
            "meft_kernels: %d trainable parameters are PEFT's and were not saved, %s among them. Save them with PEFT's "
            "own save_pretrained, into another folder: the files have the same names",
            len(left),
            left[0],
        )
