"""A patched layer while a graph of its model is recorded for inference: ``torch.export``, ``torch.jit.trace``, ONNX.

Plain products and sums, on floating-point streams: nothing is to be undone, so nothing is rounded to a fixed point.
What the graph computes differs from the patched model by that rounding.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ReversibleUsageError

if TYPE_CHECKING:
    from .layer import PatchedLayer

WHY_NOT_COMPILED = (
    "a patched layer must give the same bits in forward as in its recompute. torch.export takes it with strict=False, "
    "its default"
)
"""What ``torch.compile`` and a strict export say of it."""

Streams = tuple[torch.Tensor, torch.Tensor]


class _Recorded(threading.local):
    """By their stack, the streams between two of its calls and the place of the next one."""

    def __init__(self) -> None:
        self.streams: dict[int, tuple[int, Streams]] = {}


_recorded = _Recorded()


def exporting() -> bool:
    """Whether the calls made now are recorded as a graph for inference."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def record(
    layer: PatchedLayer, hidden_states: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
    """One layer's part of a forward pass: the read-out after it, and what else the layer returns.

    Raises:
        ReversibleUsageError: the layers below were left out.
    """
    stack, dtype = layer.stack, hidden_states.dtype
    place, streams = _recorded.streams.pop(id(stack), (0, None))
    if streams is None or stack.order[place] is not layer:
        if layer is not stack.order[0]:
            raise ReversibleUsageError(f"{layer.name} was recorded without the layers below it: export the whole model")
        wide = hidden_states if stack.config.arithmetic == "float" else hidden_states.to(_wide(dtype))
        place, streams = 0, (wide, wide)
    (a, center), extras = streams, None
    for lane in (stack.plan.first, stack.plan.second):
        y = lane.coefficient * (a - center if lane.centered else a)
        if layer.has(lane.branch):
            branch, made = layer.run(lane.branch, center.to(dtype), kwargs)
            y, extras = y + branch, made if extras is None else extras
        a, center = center, y
    streams = (center, a) if stack.plan.switched else (a, center)
    if place + 1 < len(stack.order):
        _recorded.streams[id(stack)] = place + 1, streams
    first, second = stack.plan.readout
    return (first * streams[0] + second * streams[1]).to(dtype), extras


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
