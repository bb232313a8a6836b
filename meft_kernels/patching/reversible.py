"""``reversible``: whatever trains in a model, trained without activations; nothing of ours is inserted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ..errors import PatchError
from .patch import patch

Model = TypeVar("Model", bound=nn.Module)

_OF_OURS = ("activation", "adapter_dtype", "down_init_std", "dropout", "rank", "up_init_std")
OF_ADAPTERS = ("adapters", "modules_to_save", *_OF_OURS)
"""Settings that say something of adapters of ours."""


def reversible(
    model: Model, *, memory: int | str | None = None, batch: tuple[int, int] | None = None, **settings: Any
) -> Model:
    """Train what already is trainable in a model, a PEFT LoRA say, and keep no activations of its layers; in place.

    >>> model = meft_kernels.reversible(peft.get_peft_model(model, peft.LoraConfig(...)))
    >>> Trainer(model, ...).train()
    >>> model = meft_kernels.unpatch(model).merge_and_unload()  # an ordinary model

    Nothing is inserted, and saving is whosever it was: PEFT's, transformers'. :func:`~meft_kernels.unpatch` is the way
    out, and leaves the model as if it had been trained without us, to save, merge, or serve.

    Args:
        model: a transformers model, or one that PEFT has wrapped, with whatever is to be trained requiring gradients:
            PEFT's parameters, norms, biases, some layers, all of it.
        memory: a budget, with ``batch``; see :func:`~meft_kernels.patch`.
        batch: rows and tokens of a batch.
        **settings: of :class:`~meft_kernels.MeftConfig`, but for those about adapters.

    Returns:
        The same object. A model that is reversible already, with the same settings, comes back as it is.

    Raises:
        PatchError: nothing in the model trains, or it is patched with other settings.
        ValueError: a setting is about adapters, of which there are none, or out of range.
        UnsupportedModelError, BudgetError, TypeError: as :func:`~meft_kernels.patch`. Nothing has been changed when an
            error is raised.
    """
    check_no_adapters(settings, "reversible")
    if isinstance(model, nn.Module) and not any(parameter.requires_grad for parameter in model.parameters()):
        raise PatchError(
            "nothing in this model trains: wrap it with PEFT first (get_peft_model; PeftModel.from_pretrained with "
            "is_trainable=True), or requires_grad_(True) what is to be trained. patch(model) inserts adapters of ours"
        )
    return patch(model, memory=memory, batch=batch, adapters="none", **settings)


def check_no_adapters(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that say something of adapters.

    Raises:
        ValueError: there is one; names it.
    """
    if "adapters" in settings:
        raise ValueError(f"{where} inserts no adapters, whatever the setting adapters says: leave it out")
    if "modules_to_save" in settings:
        raise ValueError(
            f"{where} saves nothing, so modules_to_save has no meaning: name those modules in PEFT's own "
            "modules_to_save, or requires_grad_(True) them in a model without PEFT"
        )
    if given := [name for name in _OF_OURS if name in settings]:
        raise ValueError(
            f"{where} inserts no adapters, so {', '.join(given)} has no meaning: PEFT's config has settings of its own"
        )
