"""Layers under ``torch.compile``: one compilation for all layers of a stack, the same one in forward and recompute."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .adapters import FfnTap

Function = Callable[..., Any]

BACKEND = "inductor"
"""torch's own default; tests use one that needs no C++ compiler."""

_RECOMPILE_LIMIT = 64
"""Layers of one stack differ (sliding attention, a first layer that makes T5's position biases), calls differ in what
they pass. torch allows 8 by default and runs the rest uncompiled."""

_compiled: weakref.WeakKeyDictionary[Any, dict[Function, Function]] = weakref.WeakKeyDictionary()
"""By stack, and not on it: what is compiled can be neither copied nor pickled, and must go with the stack."""


def compiled_for(stack: Any, function: Function) -> Function:
    """``function(module, hidden_states, **kwargs)`` compiled for all layers of one stack.

    Called on another layer, or by the recompute, it runs the same code: weights are arguments of the graph, and so are
    sizes. With sizes compiled in, a batch of another length would have a second, dynamic graph made, which would then
    serve the recompute of the first batch, too, with other bits.
    """
    functions = _compiled.setdefault(stack, {})
    if function not in functions:
        limit = {"recompile_limit": _RECOMPILE_LIMIT} if _takes_a_limit() else {}
        compiled: Any = torch.compile
        functions[function] = compiled(_of_its_own(function), backend=BACKEND, dynamic=True, **limit)
    return functions[function]


@functools.cache
def _takes_a_limit() -> bool:
    return "recompile_limit" in inspect.signature(torch.compile).parameters


def _of_its_own(function: Function) -> Function:
    """The same function with a code object of its own.

    Dynamo keeps what it has compiled by code object. A class's ``forward`` is shared by all models in the process, and
    hooks, the adapters' taps among them, are not guarded: a model without adapters would lend its graph to one with.
    """

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(module, *args, **kwargs)

    return types.FunctionType(call.__code__.replace(), globals(), call.__name__, None, call.__closure__)


def why_not_compiled(module: nn.Module, *, replaced: bool) -> str | None:
    """What of a layer cannot be compiled for all layers of its stack at once, None if nothing."""
    if replaced:
        return "a layer's forward was replaced on the instance"
    for part in module.modules():
        hooks = (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
        for hook in (hook for of_a_kind in hooks for hook in of_a_kind.values()):
            if part is not module and not isinstance(getattr(hook, "__self__", None), FfnTap):
                # dynamo guards none of them: a graph made from another layer would lack them
                return "hooks are registered inside its layers"
    return None
