"""A patched layer where nobody will go back through it: plain products and sums on floating-point streams.

What is computed is what training computes, two streams and their coefficients. Left out is what only the way back
needs: the fixed point with its rounding, remainders, checksums, random numbers of each branch's own. For passes in eval
mode without gradients, and for graphs that are recorded for inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import NonFiniteError, ReversibleUsageError
from ..memory import shortened
from .surroundings import version_of
from .variants import Branch, Lane

if TYPE_CHECKING:
    from .layer import PatchedLayer

Streams = tuple[torch.Tensor, torch.Tensor]
Extras = tuple[Any, ...] | None


def enter(hidden_states: torch.Tensor) -> torch.Tensor:
    """A stream of the hidden states, float32 at least: sums of many layers round no coarser than the fixed point's."""
    return hidden_states.to(torch.float64 if hidden_states.dtype == torch.float64 else torch.float32)


def read_out(streams: Streams, weights: tuple[float, float], dtype: torch.dtype) -> torch.Tensor:
    """The hidden states that both streams stand for."""
    (w1, w2), (x1, x2) = weights, streams
    if not w1 or not w2:
        weight, stream = (w1, x1) if w1 else (w2, x2)
        return (stream if weight == 1 else weight * stream).to(dtype)
    return torch.add(x1 if w1 == 1 else w1 * x1, x2, alpha=w2).to(dtype)


def move(
    layer: PatchedLayer, streams: Streams, main: torch.Tensor, kwargs: dict[str, Any], *, recorded: bool = False
) -> tuple[Streams, torch.Tensor, Extras]:
    """Both streams past one layer; none is written to.

    Args:
        main: the second stream in the model's dtype.
        recorded: whether a graph is made of it, in which no tiles are cut, since it serves other lengths, too.

    Returns:
        The streams, the second one in the model's dtype, and what else the layer returns.

    Raises:
        ReversibleUsageError: the layer wrote into its input.
    """
    plan, (x1, x2) = layer.plan, streams
    y1, extras = _lane(layer, plan.first, x1, x2, main, kwargs, recorded)
    value = y1.to(main.dtype)
    y2, made = _lane(layer, plan.second, x2, y1, value, kwargs, recorded)
    extras = made if extras is None else extras
    if plan.switched:
        return (y2, y1), value, extras
    return (y1, y2), y2.to(main.dtype), extras


def _lane(
    layer: PatchedLayer,
    lane: Lane,
    a: torch.Tensor,
    center: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
    recorded: bool,
) -> tuple[torch.Tensor, Extras]:
    """``branch(value) + coefficient * (a - center)``, or ``... + coefficient * a``."""
    if lane.branch == "adapter" and not lane.centered:
        kept = a if lane.coefficient == 1 else lane.coefficient * a
        return (kept if layer.adapter is None else layer.adapter.add_to(kept, value)), None
    if recorded:
        branch, extras = layer.run(lane.branch, value, kwargs)
    else:
        version = version_of(value)
        branch, extras = _in_tiles(layer, lane.branch, value, kwargs)
        if version_of(value) != version:
            raise ReversibleUsageError(
                f"{layer.name} wrote into its own input, which others read: let it work on a copy"
            )
    return torch.add(branch, a - center if lane.centered else a, alpha=lane.coefficient), extras


def _in_tiles(
    layer: PatchedLayer, branch: Branch, x: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, Extras]:
    """A branch, in the same tiles and pieces as in training: what fits into memory there fits here."""
    tiles = layer.tiles(branch, x)
    if len(tiles) == 1:
        return layer.run(branch, x, kwargs)
    if branch == "layer":
        layer.check_blocks(x, kwargs, None)
    pieces = layer.pieces(branch, kwargs, lambda kind, number: None)
    mixed, extras = x, None
    if pieces is not None:
        attended = pieces.attend(tiles, lambda tile: tile.of(x), recording=False)
    elif layer.mixes(branch):
        mixed, extras = layer.mix(x, kwargs)
    out: torch.Tensor | None = None
    for tile in shortened(tiles):
        rows = tile.of(mixed)
        if pieces is not None:
            rows = pieces.output(tile, rows, attended.of(tile))
        made = layer.rows(branch, rows, kwargs)
        out = made.new_empty(x.shape) if out is None else out
        tile.of(out).copy_(made)
    assert out is not None
    return out, extras


def check_finite(hidden_states: torch.Tensor, name: str) -> None:
    """One transfer from the device for a whole pass.

    Raises:
        NonFiniteError: there is a NaN or an infinity in what leaves the layers.
    """
    if not torch.isfinite(hidden_states).all():
        raise NonFiniteError(
            f"NaN or infinity in the hidden states that leave {name}. Common causes: float16 activations past 65504, "
            "damaged weights, a training that diverged. patch(model, inference='exact') names the layer"
        )
