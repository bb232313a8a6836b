"""What trainers ask of a model before they train it, as a patched one answers: checkpointing, quantised weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..engine.stack import ReversibleStack
from ..errors import PatchError

logger = logging.getLogger(__name__)
_SWITCH = "_set_gradient_checkpointing"
"""What transformers' enabling and disabling methods, under their old names and their new ones, all call."""


class LeaveOutReversible:
    """Stands in for the switch, because trainers turn checkpointing on by themselves (TRL's does by default).

    Reversible layers keep no activations, so that there is nothing to gain in them; other parts of the model are
    checkpointed as ever.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[ReversibleStack]) -> None:
        self._model = model
        self._stacks = stacks

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Set every flag as transformers does, and take those of the reversible layers back.

        Raises:
            PatchError: nothing in the model trains, as after PEFT's preparation of a quantised one.
        """
        adapters = self._stacks[0].layers[0].adapters
        if adapters and not any(parameter.requires_grad for parameter in self._model.parameters()):
            raise PatchError(
                "everything in this model was frozen after patch, its adapters too: peft's "
                "prepare_model_for_kbit_training does that. Leave it out (patch freezes what is to be frozen, and "
                "keeps no activations), or call it, and get_peft_model, before patch"
            )
        getattr(type(self._model), _SWITCH)(self._model, *args, **kwargs)
        found = False
        for stack in self._stacks:
            for module in (stack.owner, *(part for layer in stack.layers for part in layer.module.modules())):
                if getattr(module, "gradient_checkpointing", False):
                    module.gradient_checkpointing = False  # type: ignore[assignment]
                    found = True
        if not found:
            return
        kept = sum(stack.end - stack.reversible_end for stack in self._stacks)
        if kept:
            logger.warning(
                "meft_kernels: gradient checkpointing is left off in all patched layers, and %d of them keep their "
                "activations (engine or reversible_layers): leave these settings out to have none kept",
                kept,
            )
        else:
            logger.info("meft_kernels: gradient checkpointing is left off: reversible layers keep no activations")


class CheckpointingBinding:
    """Binds it on the model."""

    def __init__(self, model: nn.Module, stacks: Sequence[ReversibleStack]) -> None:
        self._bound = hasattr(type(model), _SWITCH) and _SWITCH not in vars(model)
        if self._bound:
            setattr(model, _SWITCH, LeaveOutReversible(model, stacks))

    def remove(self, model: nn.Module) -> None:
        """Give the model its own back."""
        if self._bound:
            delattr(model, _SWITCH)


class QuantisedBinding:
    """Has a quantised model count as one with adapters, which it is: ``Trainer`` refuses to train one without.

    transformers knows PEFT's alone, by this attribute (``validate_quantization_for_training``).
    """

    _FLAG = "_hf_peft_config_loaded"

    def __init__(self, model: nn.Module) -> None:
        self._bound = bool(getattr(model, "is_quantized", False)) and not getattr(model, self._FLAG, False)
        if self._bound:
            setattr(model, self._FLAG, True)

    def remove(self, model: nn.Module) -> None:
        """Take the mark off."""
        if self._bound:
            delattr(model, self._FLAG)
