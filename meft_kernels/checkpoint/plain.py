"""Saving a model without adapters of ours: files are PEFT's and transformers' own, and only checkpoints know of us.

A training that is resumed goes on with the same numbers only if streams are held as they were, and that is calibrated
on the first batch. So a folder named as a ``Trainer`` names its checkpoints gets the calibration: an entry of the
weights where transformers writes them, a small file where PEFT does. Any other folder is that of a model that was never
patched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..engine.layer import ADAPTERS
from ..engine.stack import ReversibleStack
from ..engine.stack_state import EXTRA_STATE, StackState
from .files import write_whole

CALIBRATION_NAME = "reversible_state.safetensors"
"""In a checkpoint of PEFT's files; PEFT does not look at it."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")


class SaveAsItWas:
    """Stands in for a model's ``save_pretrained``."""

    def __init__(self, model: Any, before: Any) -> None:
        self._model = model
        self._before = before

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """See transformers' own; arguments other than these by name."""
        save = self._before or type(self._model).save_pretrained.__get__(self._model)
        if _is_checkpoint(save_directory):
            return save(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        if state_dict is not None:
            state_dict = {name: value for name, value in state_dict.items() if not _is_ours(name)}
        with _withheld(self._model):
            return save(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)


class SaveByPeft:
    """Stands in for ``save_pretrained`` of PEFT's wrapper."""

    def __init__(self, wrapper: Any, stacks: Sequence[ReversibleStack]) -> None:
        self._wrapper = wrapper
        self._stacks = stacks

    def __call__(self, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's own."""
        made = type(self._wrapper).save_pretrained(self._wrapper, save_directory, *args, **kwargs)
        if _is_checkpoint(save_directory) and kwargs.get("is_main_process", True):
            states = {name: state.get_extra_state() for name, state in _states(self._stacks).items()}
            write_whole(Path(save_directory) / CALIBRATION_NAME, lambda path: save_file(states, path))
        return made


class LoadByPeft:
    """Stands in for ``load_adapter`` of PEFT's wrapper, which is how a ``Trainer`` resumes and takes its best model."""

    def __init__(self, wrapper: Any, stacks: Sequence[ReversibleStack]) -> None:
        self._wrapper = wrapper
        self._stacks = stacks

    def __call__(self, model_id: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """See PEFT's own.

        Raises:
            PatchError: it is a checkpoint of a model that was reversible with other settings. Nothing has been changed.
        """
        found = _calibration_in(Path(model_id))
        states = _states(self._stacks)
        for name, state in states.items():
            if name in found:
                state.check(found[name])
        loaded = type(self._wrapper).load_adapter(self._wrapper, model_id, *args, **kwargs)
        for name, state in states.items():
            if name in found:
                state.set_extra_state(found[name])
        return loaded


class PlainSavingBinding:
    """Binds these on the model, and on PEFT's wrapper around it."""

    def __init__(self, model: Any, wrapper: Any, stacks: Sequence[ReversibleStack]) -> None:
        self._wrapper = wrapper
        self._before = vars(model).get("save_pretrained")
        self._bound = hasattr(model, "save_pretrained")
        if self._bound:
            model.save_pretrained = SaveAsItWas(model, self._before)
        if wrapper is not None:
            wrapper.save_pretrained = SaveByPeft(wrapper, stacks)
            wrapper.load_adapter = LoadByPeft(wrapper, stacks)

    def remove(self, model: Any) -> None:
        """Give both their own back."""
        if self._bound and self._before is None:
            del model.save_pretrained
        elif self._bound:
            model.save_pretrained = self._before
        if self._wrapper is not None:
            del self._wrapper.save_pretrained, self._wrapper.load_adapter


def _is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    return _CHECKPOINT.fullmatch(Path(folder).name) is not None


def _is_ours(name: str) -> bool:
    return name.endswith(f".{ADAPTERS}.state.{EXTRA_STATE}")


@contextmanager
def _withheld(model: nn.Module) -> Iterator[None]:
    """Inside, ``state_dict()`` is that of the model before it was patched."""

    def drop(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        for name in [name for name in state_dict if _is_ours(name)]:
            del state_dict[name]

    handle = model.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def _states(stacks: Sequence[ReversibleStack]) -> dict[str, StackState]:
    """The modules that hold the calibration, by the run of layers: of one list there may be several."""
    return {stack.label: stack.layers[0].module.get_submodule(f"{ADAPTERS}.state") for stack in stacks}  # type: ignore[misc]


def _calibration_in(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of it; PEFT puts adapters that are not called ``default`` into folders of their own."""
    for place in (folder, folder.parent):
        if _is_checkpoint(place) and (place / CALIBRATION_NAME).is_file():
            return load_file(place / CALIBRATION_NAME)
    return {}
