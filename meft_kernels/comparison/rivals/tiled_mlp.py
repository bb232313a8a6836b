"""Feed-forward modules in tiles of tokens, forward and backward: FFN-wide tensors exist for one tile.

As in Arctic long sequence training (Snowflake, arXiv 2506.13996), whose rule for the tile's size this is, in Unsloth
and in Hugging Face's kernels; a version of our own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ...architectures import LayerSpec
from ...architectures.layer_lists import find_layers
from ...config import MeftConfig
from ...memory import shortened
from ...patching.state import unwrap
from ...patching.targets import find_spec
from .base import UnavailableRivalError

Forward = Callable[[torch.Tensor], torch.Tensor]


class _Surroundings:
    """Random states and autocast as forward has them, for backward."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.device = hidden.device.type
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(hidden)
        self.autocast = torch.is_autocast_enabled(self.device)
        self.dtype = torch.get_autocast_dtype(self.device)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with (
            torch.random.fork_rng(self.devices, device_type="cuda" if self.device == "cpu" else self.device),
            torch.autocast(self.device, self.dtype, enabled=self.autocast),
        ):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


class _Tiled(torch.autograd.Function):
    """``forward`` of tile after tile. Every tile's graph is made in backward, from the tile of the input."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, forward: Forward, rows: int, *trained: nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.forward, ctx.rows, ctx.trained, ctx.surroundings = forward, rows, trained, _Surroundings(hidden)
        out: torch.Tensor | None = None
        for start in shortened(range(0, len(hidden), rows)):
            tile = slice(start, start + rows)
            made = forward(hidden[None, tile])[0]
            if out is None:
                out = made.new_empty(len(hidden), made.shape[1])
            out[tile] = made
            del made
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_trained: list[torch.Tensor | None] = [None] * len(ctx.trained)
        with ctx.surroundings.again():
            for start in shortened(range(0, len(hidden), ctx.rows)):
                tile = slice(start, start + ctx.rows)
                d_hidden[tile], *found = _tile_backward(ctx.forward, hidden[tile], ctx.trained, d_out[tile])
                for place, gradient in enumerate(found):
                    held = d_trained[place]
                    d_trained[place] = gradient if held is None or gradient is None else held.add_(gradient)
                del found
        return d_hidden, None, None, *d_trained


def _tile_backward(
    forward: Forward, hidden: torch.Tensor, trained: tuple[nn.Parameter, ...], d_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        out = forward(leaf[None])[0]
    return torch.autograd.grad(out, [leaf, *trained], d_out, allow_unused=True)


def tile_mlps(model: Any, rows: int | None = None) -> None:
    """Bind every layer's feed-forward part to run in tiles.

    Args:
        rows: tokens of a tile. None: as many as the hidden states are wide.

    Raises:
        UnavailableRivalError: a layer has no module or method that is its whole feed-forward part.
    """
    base = unwrap(model)
    rows = rows or base.config.get_text_config().hidden_size
    lists = find_layers(base, find_spec(base, MeftConfig()))
    places = [_place(layer, found.spec) for found in lists for layer in found.layers]
    for owner, name in places:
        setattr(owner, name, _in_tiles(getattr(owner, name), owner, rows))


def _place(layer: Any, spec: LayerSpec) -> tuple[nn.Module, str]:
    """Whose call, of what name, is the layer's feed-forward part."""
    if hasattr(layer, "feed_forward_chunk"):  # BERT and its kin, to whom transformers' own chunks are nothing new
        return layer, "feed_forward_chunk"
    reads, writes = spec.ffn_reads(layer), spec.ffn_writes(layer)
    if all(module is not writes for module in reads.modules()):
        raise UnavailableRivalError(f"{type(layer).__name__} has no module that is its whole feed-forward part")
    return reads, "forward"


def _in_tiles(plain: Forward, owner: nn.Module, rows: int) -> Forward:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or hidden.numel() <= rows * hidden.shape[-1]:
            return plain(hidden)
        trained = [parameter for parameter in owner.parameters() if parameter.requires_grad]
        flat: torch.Tensor = _Tiled.apply(hidden.reshape(-1, hidden.shape[-1]), plain, rows, *trained)
        return flat.view(*hidden.shape[:-1], -1)

    return forward
