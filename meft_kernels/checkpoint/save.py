"""``save_adapter``, and ``save_pretrained`` of a patched model."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import SAFE_WEIGHTS_NAME

from ..errors import PatchError
from ..state import require_state, unwrap
from ..switching import activated
from ..targets import is_peft
from .base_model import describe_base, describe_labels, fingerprint
from .card import model_card
from .files import CARD_NAME, CONFIG_NAME, FORMAT, WEIGHTS_NAME, saved_names, write_whole

logger = logging.getLogger(__name__)


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter, and the modules trained with it, to a folder; the backbone is not copied.

    Beside the weights and the settings, a model card (``README.md``) makes the folder ready for the hub; one that is
    there already is kept. With several processes all may call this, and under FSDP2 all must; the first one writes.

    Args:
        model: a patched model.
        directory: the folder, made if it is not there.
        adapter_name: which of several adapters; the active one by default.
        state_dict: where to take the weights from instead of the model (gathered from other processes, say).

    Raises:
        PatchError: the model is not patched, or has no adapters, or none of this name.
        OSError: the folder cannot be written.
    """
    state = require_state(model)
    base = unwrap(model)
    with nullcontext() if adapter_name in (None, state.active) else activated(model, str(adapter_name)):
        names = saved_names(base, state)
        if not names:
            raise PatchError(
                "there are no adapters to save (adapters='none'): save a PEFT model with its own save_pretrained"
            )
        _warn_of_unsaved(base, names.values())
        tensors = base.state_dict(keep_vars=True) if state_dict is None else state_dict
        if missing := [name for name in names.values() if name not in tensors]:
            raise PatchError(f"state_dict lacks {len(missing)} of the adapter's tensors, {missing[0]} among them")
        weights = {key: _whole(tensors[name]) for key, name in names.items()}
        lam, beta = state.config.coefficients
        description = {
            "format_version": FORMAT,
            "library": "meft_kernels",
            "library_version": library_version(),
            **describe_base(base),
            # With the coefficients that the config left to this version's defaults.
            "config": dataclasses.replace(state.config, lam=lam, beta=beta).to_dict(),
            "labels": describe_labels(base),
            "base_fingerprint": fingerprint(base, names.values()),
        }
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # The config last, so that a folder with one is complete.
    write_whole(folder / WEIGHTS_NAME, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    if not (folder / CARD_NAME).exists():
        card = model_card(description, sum(tensor.numel() for tensor in weights.values()))
        write_whole(folder / CARD_NAME, lambda path: path.write_text(card, encoding="utf-8"))
    text = json.dumps(description, indent=2) + "\n"
    write_whole(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


class SavePretrained:
    """Stands in for a patched model's ``save_pretrained``: writes the adapter, not the backbone.

    A ``transformers.Trainer`` calls it for its checkpoints. What its own loader looks for, when it resumes or takes the
    best checkpoint, is ``model.safetensors``: here another name of the adapter's file.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """See :func:`save_adapter`, and ``PreTrainedModel.save_pretrained`` for the arguments.

        Those about how a whole model is cut into files mean nothing here.
        """
        if not is_main_process and not (dist.is_available() and dist.is_initialized()):
            return
        save_adapter(self.model, save_directory, state_dict=state_dict)
        if not is_main_process or (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0):
            return
        folder = Path(save_directory)
        write_whole(folder / SAFE_WEIGHTS_NAME, lambda path: _link(folder / WEIGHTS_NAME, path))
        if push_to_hub:
            self._upload(folder, **kwargs)

    @staticmethod
    def _upload(
        folder: Path,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        **_: Any,
    ) -> None:
        import huggingface_hub

        api = huggingface_hub.HfApi(token=token)
        made = api.create_repo(repo_id or folder.name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            allow_patterns=[WEIGHTS_NAME, CONFIG_NAME, CARD_NAME],
        )


def library_version() -> str:
    """This library's version, as installed."""
    try:
        return version("meft_kernels")
    except PackageNotFoundError:
        return "unknown"


def _link(target: Path, path: Path) -> None:
    """The same file under another name, or a copy where the file system cannot do that."""
    try:
        os.link(target, path)
    except OSError:
        shutil.copyfile(target, path)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True).contiguous()


def _warn_of_unsaved(base: nn.Module, names: Iterable[str]) -> None:
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
