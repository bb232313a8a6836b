"""A patched layer while a graph of its model is recorded for inference: ``torch.export``, ``torch.jit.trace``, ONNX.

Plain products and sums, on floating-point streams; see :mod:`.inference`. What the graph computes differs from the
patched model in training by the fixed point's rounding.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ReversibleUsageError
from .inference import Streams, enter, move, read_out

if TYPE_CHECKING:
    from .layer import PatchedLayer

WHY_NOT_COMPILED = (
    "a patched layer must give the same bits in forward as in its recompute. torch.export takes it with strict=False, "
    "its default"
)
"""What ``torch.compile`` and a strict export say of it."""


class _Recorded(threading.local):
    """By their stack, between two of its calls: the place of the next one, both streams, the second in the model's
    dtype."""

    def __init__(self) -> None:
        self.streams: dict[int, tuple[int, Streams, torch.Tensor]] = {}


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
    stack = layer.stack
    held = _recorded.streams.pop(id(stack), None)
    if held is None or stack.order[held[0]] is not layer:
        if layer is not stack.order[0]:
            raise ReversibleUsageError(f"{layer.name} was recorded without the layers below it: export the whole model")
        wide = enter(hidden_states)
        held = 0, (wide, wide), hidden_states
    place, streams, main = held
    streams, main, extras = move(layer, streams, main, kwargs, recorded=True)
    if place + 1 < len(stack.order):
        _recorded.streams[id(stack)] = place + 1, streams, main
    return read_out(streams, stack.plan.readout, hidden_states.dtype), extras
