"""What of a model's own saving and loading is another while it is patched: checkpoints hold the adapter alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import PatchError
from ..state import find_state
from .files import saved_names
from .save import SavePretrained


class CheckpointBinding:
    """Binds ``save_pretrained`` on the model, and lets ``load_state_dict`` take a state without the backbone."""

    def __init__(self, model: nn.Module) -> None:
        self._saves = hasattr(model, "save_pretrained")
        self._before = vars(model).get("save_pretrained")
        if self._saves:
            model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
        self._handle: RemovableHandle = model.register_load_state_dict_post_hook(_allow_adapter_alone)

    def remove(self, model: nn.Module) -> None:
        """Give the model its own back."""
        self._handle.remove()
        if self._before is not None:
            model.save_pretrained = self._before
        elif self._saves:
            del model.save_pretrained


def _allow_adapter_alone(model: nn.Module, incompatible_keys: Any) -> None:
    """A state with the whole adapter and no backbone lacks nothing; a ``Trainer`` would list the backbone's keys."""
    state = find_state(model)
    if state is None or not incompatible_keys.missing_keys:
        return
    try:
        ours = set(saved_names(model, state).values())
    except PatchError:  # layers inside wrappers that we do not know: leave it to torch to say what is missing
        return
    if set(incompatible_keys.missing_keys) == model.state_dict().keys() - ours:
        incompatible_keys.missing_keys.clear()
