"""What the ``forward`` of the model that loops over the layers becomes: one call of it is one pass through them."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import nn

from .bound import BoundForward
from .calibration import Uncalibrated, calibrate
from .exporting import WHY_NOT_COMPILED, exporting
from .threads import Turn


class Stack(Uncalibrated, Protocol):
    """What a call needs of a stack of layers."""

    @property
    def bypassed(self) -> bool:
        """Whether this thread calls the pretrained layers as they were."""

    def admit(self, call: OwnerCall) -> None:
        """A call of the model is about to begin."""

    def begin(self, call: OwnerCall) -> None:
        """It begins."""

    def finish(self, returned: Any) -> None:
        """It has returned this."""

    def leave(self) -> None:
        """It has ended, whichever way."""


class OwnerCall:
    """One call of the model: its arguments as they were given, and by name."""

    def __init__(self, bound: BoundOwner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.bound, self.args, self.kwargs = bound, args, kwargs
        self.named = bound.by_name(args, kwargs)

    def repeat(self, replaced: dict[str, Any]) -> Any:
        """The model's own forward on the same arguments, but for these."""
        args = [replaced.get(name, value) for name, value in zip(self.bound._parameters, self.args, strict=False)]
        kwargs = {name: replaced.get(name, value) for name, value in self.kwargs.items()}
        return self.bound.original(*args, *self.args[len(args) :], **kwargs)


_BOUND = "_meft_forward"
"""Attribute of the model under which the object is found, whatever else has become its ``forward``."""


class Unbound:
    """The function that a method would have: accelerate takes it, wraps it, and makes a method of the model of it.

    It finds its object by the model that it is called with, so that the method of a copy is the copy's.
    """

    def __init__(self, signature: inspect.Signature) -> None:
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        self.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(module)[_BOUND](*args, **kwargs)


class BoundOwner(BoundForward):
    """Stands in for the model's ``forward``.

    Hooks on the model would do the same for ``model(...)`` and be passed by where ``model.forward(...)`` is called.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._stacks: tuple[Stack, ...] = ()
        """Those through which a call of the model goes."""
        self._calibrating = Turn()

    @classmethod
    def of(cls, stack: Stack, module: nn.Module) -> BoundOwner:
        """The object in the place of the model's ``forward``: that of its other stacks, one that a wrapper has kept
        there, or a new one."""
        bound = vars(module).get(_BOUND)
        if not isinstance(bound, BoundOwner):
            bound = cls(module)
            bound.bind()
            setattr(module, _BOUND, bound)
        bound._stacks = (*bound._stacks, stack)
        return bound

    @property
    def __func__(self) -> Unbound:
        return Unbound(self.__signature__)

    def release(self, stack: Stack) -> None:
        """Have this stack no part in calls any more; without any, give the model its own forward back.

        Where somebody's wrapper is around this object, both stay.
        """
        self._stacks = tuple(other for other in self._stacks if other is not stack)
        if self._stacks or not isinstance(getattr(vars(self.module).get("forward"), "__func__", None), Unbound):
            return
        self.unbind()
        delattr(self.module, _BOUND)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call, with a pass through each of its stacks around it."""
        stacks = self._stacks
        if exporting() and self._instance_forward is None:  # a strict export traces no method that is bound on the way
            return type(self.module).forward(self.module, *args, **kwargs)
        if not stacks or stacks[0].bypassed or exporting():
            return self.original(*args, **kwargs)
        self._begin(stacks, args, kwargs)
        try:
            returned = self.original(*args, **kwargs)
            self._finish(stacks, returned)
        finally:
            self._leave(stacks)
        return returned

    # Around what torch.compile may trace.

    @torch.compiler.disable(reason=WHY_NOT_COMPILED)
    def _begin(self, stacks: tuple[Stack, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = OwnerCall(self, args, kwargs)
        admitted: list[Stack] = []
        try:
            for stack in stacks:
                stack.admit(call)
                admitted.append(stack)
            calibrate(stacks, call, self._calibrating)
            for stack in stacks:
                stack.begin(call)
        except BaseException:
            self._leave(tuple(admitted))
            raise

    @torch.compiler.disable(reason=WHY_NOT_COMPILED)
    def _finish(self, stacks: tuple[Stack, ...], returned: Any) -> None:
        for stack in stacks:
            stack.finish(returned)

    @torch.compiler.disable(reason=WHY_NOT_COMPILED)
    def _leave(self, stacks: tuple[Stack, ...]) -> None:
        for stack in stacks:
            stack.leave()
