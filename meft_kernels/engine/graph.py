"""The graph of one branch: what it reaches, what may not come down it, and the gradients that go down it.

Forward makes the graph and drops it. The recompute makes it again and differentiates it at once, inside of the backward
that the user called: two backward passes under way, in which hooks of the user's are to run in one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from ..errors import ReversibleUsageError

_run_backward: Any = torch.autograd.graph._engine_run_backward


class _State(threading.local):
    inner = False
    """Whether a branch is being differentiated in this thread."""


_state = _State()


def gradients_of(
    outputs: Sequence[torch.Tensor] | Sequence[GradientEdge],
    inputs: Sequence[torch.Tensor],
    incoming: Sequence[torch.Tensor],
    *,
    allow_unused: bool = True,
    retain_graph: bool = False,
) -> tuple[Any, ...]:
    """Send ``incoming`` down a branch's graph; None for the inputs that nothing reaches, where that is allowed."""
    for tensor in inputs:
        if tensor._backward_hooks:
            _run_once(tensor)
    before, _state.inner = _state.inner, True
    try:
        # What torch.autograd.grad calls when it has made sure of what is known here: half of its time is that.
        return _run_backward(
            tuple(outputs), tuple(incoming), retain_graph, False, tuple(inputs), allow_unused, accumulate_grad=False
        )
    finally:
        _state.inner = before


class _RunOnce:
    """A user's hook on a tensor that branches are differentiated by."""

    def __init__(self, hook: Any) -> None:
        self._hook = hook

    def __call__(self, gradient: torch.Tensor) -> Any:
        return None if _state.inner else self._hook(gradient)


def _run_once(tensor: torch.Tensor) -> None:
    """Have the tensor's hooks run with its whole gradient alone, and not with a branch's part of it as well.

    They stay wrapped: to take them off for a while would take them from another thread's backward, too.
    """
    hooks: Any = tensor._backward_hooks
    for key, hook in list(hooks.items()):
        if not isinstance(hook, _RunOnce | _Captured):
            hooks[key] = _RunOnce(hook)


class _Captured:
    """On a leaf in forward, whose graph is dropped: a gradient that comes down to it would be lost."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __call__(self, gradient: torch.Tensor) -> None:
        if not _state.inner:  # arguments' leaves serve the recompute, too
            raise ReversibleUsageError(
                f"a tensor from inside of {self._where} is part of the loss (a hook has captured it): a reversible "
                "layer keeps nothing that its gradient could go on through. Use the model's outputs, detach() what "
                "was captured, or patch(model, engine='autograd')."
            )


def leaf_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values, to differentiate a branch by."""
    return tensor.detach().requires_grad_()


def guarded_leaf_of(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The same for a forward, after which nothing from ``where`` may be part of a loss but what is handed out."""
    leaf = leaf_of(tensor)
    leaf.register_hook(_Captured(where))
    return leaf


def reached_by(outputs: Iterable[torch.Tensor], stops: Iterable[Any]) -> set[Any]:
    """The ends of the outputs' graph: nodes of leaves, and those of ``stops`` that it leads to."""
    stops = set(stops)
    starts = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen: dict[Any, bool] = dict.fromkeys(starts, True)  # to whether the node is an end
    todo = list(seen)
    for node in todo:  # which grows meanwhile
        if node in stops:
            continue
        below = node.next_functions
        for next_node, _ in below:
            if next_node is not None and next_node not in seen:
                seen[next_node] = True
                todo.append(next_node)
        seen[node] = not below
    return {node for node, is_end in seen.items() if is_end}
