"""What the ``forward`` of the model that loops over the layers becomes: one call of it is one pass through them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from .bound import BoundForward


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


class BoundOwner(BoundForward):
    """Stands in for the model's ``forward``.

    Hooks on the model would do the same for ``model(...)`` and be passed by where ``model.forward(...)`` is called.
    """

    def __init__(self, stack: Stack, module: nn.Module) -> None:
        super().__init__(module)
        self._stack: Stack | None = stack

    def release(self) -> None:
        """Have no part in calls any more, also where somebody's wrapper holds this object."""
        self._stack = None
        if self.is_bound:
            self.unbind()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call, with a pass through the stack around it."""
        stack = self._stack
        if stack is None or stack.bypassed:
            return self.original(*args, **kwargs)
        self._begin(stack, args, kwargs)
        try:
            returned = self.original(*args, **kwargs)
            self._finish(stack, returned)
        finally:
            self._leave(stack)
        return returned

    # Around what torch.compile may trace.

    @torch.compiler.disable
    def _begin(self, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.begin(OwnerCall(self, args, kwargs))

    @torch.compiler.disable
    def _finish(self, stack: Stack, returned: Any) -> None:
        stack.finish(returned)

    @torch.compiler.disable
    def _leave(self, stack: Stack) -> None:
        stack.leave()
