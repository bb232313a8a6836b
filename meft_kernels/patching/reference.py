"""``reference_model``: the pretrained model beside the one that trains, without a second copy of the weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PatchError
from .state import adapter_module_names, require_state, unwrap
from .switching import disable_adapter


class ReferenceModel(nn.Module):
    """A view of a patched model that computes what the pretrained one does. Made by :func:`reference_model`.

    It has no parameters or modules of its own, so that ``.to()``, ``.train()``, a wrapper or an optimizer do not reach
    the model through it. Its attributes (``config``, ``generate``, ``base_model``, ...) are the model's, and compute as
    it does: adapters left out, eval mode, no gradients.
    """

    def __init__(self, part: nn.Module, model: nn.Module) -> None:
        super().__init__()
        # Not registered: neither is a child.
        object.__setattr__(self, "_part", part)
        object.__setattr__(self, "_model", model)
        self.training = False

    def __getattr__(self, name: str) -> Any:
        if name in ("_part", "_model"):  # not there yet, while this is being copied
            raise AttributeError(name)
        found = getattr(self._part, name)
        if isinstance(found, PreTrainedModel):
            return ReferenceModel(found, self._model)
        if inspect.ismethod(found):
            return functools.wraps(found)(lambda *args, **kwargs: self._run(found, *args, **kwargs))
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``forward``, or what a trainer has bound in its place: that may call the model's parts by itself."""
        return self._run(super().__call__, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self._run(self._part, *args, **kwargs)

    def _run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        with disable_adapter(self._model), _evaluating(self._model), torch.no_grad():
            return function(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The pretrained model's, adapters left out: trainers tell references apart by it."""
        state = self._model.state_dict(*args, **kwargs)
        ours = tuple(f"{name}." for name in adapter_module_names(require_state(self._model)))
        return {name: tensor for name, tensor in state.items() if not name.startswith(ours)}


def reference_model(model: nn.Module) -> ReferenceModel:
    """The pretrained model for comparison while the patched one trains: DPO's reference, a teacher for distillation.

    ``DPOTrainer(model, ref_model=reference_model(model), ...)``. It gives the bits of a copy that was never patched, in
    eval mode, and takes no memory. It may be called between the model's forward and its backward.

    Args:
        model: a patched model of which nothing trains but adapters.

    Raises:
        PatchError: the model is not patched, or other weights train as well, which would move the reference.
    """
    state = require_state(model)
    base = unwrap(model)
    ours = tuple(f"{name}." for name in adapter_module_names(state))
    moving = [name for name, p in base.named_parameters() if p.requires_grad and not name.startswith(ours)]
    if moving:
        raise PatchError(
            f"{len(moving)} trainable parameters are no adapters of meft_kernels, {moving[0]} among them: a reference "
            "that shares them would train along. Use a second copy of the pretrained model as the reference"
        )
    return ReferenceModel(base, base)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
