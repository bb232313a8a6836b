"""What the ``forward`` of the model that loops over the layers becomes: one call of it is one pass through them."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import nn

from .bound import BoundForward
from .exporting import WHY_NOT_COMPILED, exporting


class Stack(Protocol):
    """What a call needs of the stack of layers."""

    @property
    def bypassed(self) -> bool:
        """Whether this thread calls the pretrained layers as they were."""

    def begin(self, call: OwnerCall) -> None:
        """A call of the model begins."""

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

    def __init__(self, stack: Stack, module: nn.Module) -> None:
        super().__init__(module)
        self._stack: Stack | None = stack
        self._before = vars(module).get(_BOUND)  # of another list of layers that the model owns

    @classmethod
    def of(cls, stack: Stack, module: nn.Module) -> BoundOwner:
        """The object in the place of the model's ``forward``: a new one, or one that a wrapper has kept there."""
        left = vars(module).get(_BOUND)
        if isinstance(left, BoundOwner) and left._stack is None:
            left._stack = stack
            return left
        bound = cls(stack, module)
        bound.bind()
        setattr(module, _BOUND, bound)
        return bound

    @property
    def __func__(self) -> Unbound:
        return Unbound(self.__signature__)

    def release(self) -> None:
        """Have no part in calls any more, also where somebody's wrapper around this object stays."""
        self._stack = None
        if not isinstance(getattr(vars(self.module).get("forward"), "__func__", None), Unbound):
            return
        self.unbind()
        if self._before is None:
            delattr(self.module, _BOUND)
        else:
            setattr(self.module, _BOUND, self._before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call, with a pass through the stack around it."""
        stack = self._stack
        if exporting() and self._instance_forward is None:  # a strict export traces no method that is bound on the way
            return type(self.module).forward(self.module, *args, **kwargs)
        if stack is None or stack.bypassed or exporting():
            return self.original(*args, **kwargs)
        self._begin(stack, args, kwargs)
        try:
            returned = self.original(*args, **kwargs)
            self._finish(stack, returned)
        finally:
            self._leave(stack)
        return returned

    # Around what torch.compile may trace.

    @torch.compiler.disable(reason=WHY_NOT_COMPILED)
    def _begin(self, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.begin(OwnerCall(self, args, kwargs))

    @torch.compiler.disable(reason=WHY_NOT_COMPILED)
    def _finish(self, stack: Stack, returned: Any) -> None:
        stack.finish(returned)

    @torch.compiler.disable(reason=WHY_NOT_COMPILED)
    def _leave(self, stack: Stack) -> None:
        stack.leave()
