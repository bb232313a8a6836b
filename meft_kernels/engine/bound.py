"""Objects that stand in for a module's ``forward``, bound on the instance: direct calls of it meet them, too."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn


class BoundForward:
    """What is the same whatever the object does when it is called."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._instance_forward = vars(module).get("forward")  # another library's, bound before ours
        # The class's own names: an instance's forward may be somebody's `(*args, **kwargs)`.
        self._parameters = [
            parameter.name
            for parameter in inspect.signature(type(module).forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ][1:]

    @property
    def original(self) -> Callable[..., Any]:
        """The module's forward as it was. Looked up and not stored: a pickled bound method would come back as ours."""
        return self._instance_forward or types.MethodType(type(self.module).forward, self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def bind(self) -> None:
        """Put this object in the place of the module's ``forward``."""
        self.module.forward = self

    @property
    def is_bound(self) -> bool:
        """Whether the module's ``forward`` is this object, and nobody's wrapper around it."""
        return vars(self.module).get("forward") is self

    def unbind(self) -> None:
        """Give the module its own ``forward`` back."""
        if self._instance_forward is None:
            del self.module.forward
        else:
            self.module.forward = self._instance_forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's ``forward`` now does."""
        raise NotImplementedError

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name: their order differs between families and versions."""
        return {**dict(zip(self._parameters, args, strict=False)), **kwargs}
