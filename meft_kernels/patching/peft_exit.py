"""``merge_and_unload`` and ``unload`` of PEFT, in a model that is reversible for what PEFT trains and nothing else.

They give back the model without PEFT, to be served or saved. With PEFT goes what the model was made reversible for:
left so, it would go on with the two streams, whose small leak nobody would look for in a merged model.
``merge_adapter``, which is for a while, leaves the model reversible (TRL hands its weights to vLLM so).
"""

from __future__ import annotations

from typing import Any

from torch import nn

_WAYS_OUT = ("merge_and_unload", "unload")


class LeaveWithPeft:
    """Stands in for one of them."""

    def __init__(self, tuner: Any, way: str) -> None:
        self._tuner = tuner
        self._way = way

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See PEFT's own; what it returns is no longer patched.

        Raises:
            PatchError: as :func:`~meft_kernels.unpatch`. Nothing has been changed.
        """
        from .patch import check_may_unpatch, unpatch  # which binds this

        check_may_unpatch(self._tuner.model)
        left = getattr(type(self._tuner), self._way)(self._tuner, *args, **kwargs)
        return unpatch(left)


class PeftExitBinding:
    """Binds them on PEFT's tuner, the part of its wrapper that knows how; prompts have none."""

    def __init__(self, wrapper: Any) -> None:
        tuner = wrapper.base_model
        self._tuner = tuner
        self._ways = [way for way in _WAYS_OUT if callable(getattr(type(tuner), way, None))]
        for way in self._ways:
            setattr(tuner, way, LeaveWithPeft(tuner, way))

    def remove(self, model: nn.Module) -> None:
        """Give the tuner its own back."""
        for way in self._ways:
            delattr(self._tuner, way)
