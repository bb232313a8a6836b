"""The bottleneck adapter, and the tap that puts one parallel to a layer's FFN."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN


class Adapter(nn.Module):
    """Linear(H, rank), activation, dropout, Linear(rank, H); no skip, no scale (the paper's section 3.1).

    The weights may be wider than the hidden states (float32 beside a bfloat16 model, so that small updates are not
    rounded away); they are cast to the input's dtype at use, which costs rank/rows of the product itself.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        activation: str,
        dropout: float,
        *,
        down_init_std: float,
        up_init_std: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, device=device, dtype=dtype)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(rank, hidden_size, device=device, dtype=dtype)
        for linear, std in ((self.down, down_init_std), (self.up, up_init_std)):
            nn.init.normal_(linear.weight, std=std) if std else nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``, in the input's dtype (autocast's, where it is on)."""
        bottleneck = self.dropout(self.activation(_linear(hidden_states, self.down)))
        return _linear(bottleneck, self.up)


def _linear(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


class Switch(Protocol):
    """Tells whether the adapters are in force; see ``ReversibleStack``."""

    bypassed: bool


class FfnTap:
    """Adds ``adapter(x)`` to what the FFN gives, x being what the FFN reads.

    Two forward hooks, because in post-norm layers the FFN's two linears sit in different modules. Bound methods of a
    plain object rather than closures, so that ``copy.deepcopy`` of a patched model taps the copy.
    """

    def __init__(self, adapter: Adapter, reads: nn.Module, writes: nn.Module, switch: Switch) -> None:
        self.adapter = adapter
        self._switch = switch
        self._pending: dict[int, torch.Tensor] = {}  # by thread: nn.DataParallel replicas share this object
        self._handles = [
            reads.register_forward_pre_hook(self._read, with_kwargs=True),
            writes.register_forward_hook(self._write),
        ]

    def remove(self) -> None:
        """Take both hooks off."""
        for handle in self._handles:
            handle.remove()

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._switch.bypassed:
            self._pending[threading.get_ident()] = args[0] if args else next(iter(kwargs.values()))

    def _write(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        hidden_states = self._pending.pop(threading.get_ident(), None)
        if hidden_states is None:
            return None
        return output + self.adapter(hidden_states).to(output.dtype)
