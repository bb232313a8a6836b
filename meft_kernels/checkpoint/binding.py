"""A patched model's own ``save_pretrained``, ``push_to_hub`` and ``load_state_dict``: they deal in adapters alone."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import SAFE_WEIGHTS_NAME

from ..engine.stack_state import EXTRA_STATE, StackState
from ..errors import PatchError
from ..patching.state import find_state
from .files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, brought_names, saved_names, write_whole
from .save import is_distributed, save_adapter, writes


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
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """See :func:`~meft_kernels.save_adapter`, and transformers' own for the arguments.

        Those about how a whole model is cut into files mean nothing here.
        """
        if not is_main_process and not is_distributed():
            return
        save_adapter(self.model, save_directory, state_dict=state_dict)
        if not is_main_process or not writes():
            return
        folder = Path(save_directory)
        write_whole(folder / SAFE_WEIGHTS_NAME, lambda path: _link(folder / WEIGHTS_NAME, path))
        if push_to_hub:
            _upload(folder, repo_id or folder.name, **kwargs)


class PushToHub:
    """Stands in for a patched model's ``push_to_hub``: uploads the adapter and its card."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, repo_id: str, **kwargs: Any) -> Any:
        """See ``PreTrainedModel.push_to_hub``; what it says of shards means nothing here."""
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.model, folder)
            return _upload(Path(folder), repo_id, **kwargs) if writes() else None


class SavingBinding:
    """Binds these on the model, and lets ``load_state_dict`` take a state without the backbone."""

    def __init__(self, model: nn.Module) -> None:
        ours = {"save_pretrained": SavePretrained(model), "push_to_hub": PushToHub(model)}
        self._before = {name: vars(model).get(name) for name in ours if hasattr(model, name)}
        for name in self._before:
            setattr(model, name, ours[name])
        self._handle: RemovableHandle = model.register_load_state_dict_post_hook(_allow_adapter_alone)

    def remove(self, model: nn.Module) -> None:
        """Give the model its own back."""
        self._handle.remove()
        for name, before in self._before.items():
            if before is None:
                delattr(model, name)
            else:
                setattr(model, name, before)


class LoadingBinding:
    """Has ``load_state_dict`` look at what a stack's settings and calibration are before it copies anything."""

    def __init__(self, model: nn.Module) -> None:
        self._handle: RemovableHandle = model.register_load_state_dict_pre_hook(_check_stack_states)

    def remove(self, model: nn.Module) -> None:
        """Take it off."""
        self._handle.remove()


def _upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **_: Any,
) -> Any:
    api = huggingface_hub.HfApi(token=token)
    made = api.create_repo(repo_id, private=private, exist_ok=True)
    return api.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload adapter",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        allow_patterns=[WEIGHTS_NAME, CONFIG_NAME, CARD_NAME],
    )


def _link(target: Path, path: Path) -> None:
    """The same file under another name, or a copy where the file system cannot do that."""
    try:
        os.link(target, path)
    except OSError:
        shutil.copyfile(target, path)


def _allow_adapter_alone(model: nn.Module, incompatible_keys: Any) -> None:
    """A state with the whole adapter and no backbone lacks nothing; a ``Trainer`` would list the backbone's keys."""
    state = find_state(model)
    if state is None or not incompatible_keys.missing_keys:
        return
    try:
        ours = {*saved_names(model, state).values(), *brought_names(model, state).values()}
    except PatchError:  # layers inside wrappers that we do not know: leave it to torch to say what is missing
        return
    if set(incompatible_keys.missing_keys) == model.state_dict().keys() - ours:
        incompatible_keys.missing_keys.clear()


def _check_stack_states(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raises what :meth:`StackState.check` does."""
    for name, module in model.named_modules():
        key = f"{prefix}{name}.{EXTRA_STATE}"
        if isinstance(module, StackState) and key in state_dict:
            module.check(state_dict[key])
