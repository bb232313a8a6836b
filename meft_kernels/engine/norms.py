"""Norms written in plain torch, made to keep their input alone.

What autograd keeps of such a formula (RMSNorm in transformers: two float32 copies of its 16-bit input) lasts until the
layer's backward reaches it. Computed again there, some rows at a time, it is the input that lasts, which the layer
holds anyway. The formula stays the module's own, and so do its bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..memory import shortened
from ..modules import modules_of
from .exporting import exporting
from .graph import gradients_of
from .tiles import auto_rows


class _ByRows(torch.autograd.Function):
    """A norm of ``[rows, H]``, so many rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: LeanNorm, rows: int, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.norm, ctx.rows, ctx.parameters = norm, rows, parameters
        return norm.by_rows(x, rows)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True, which is to go through the formula itself
            wanted = [x, *ctx.parameters] if x.requires_grad else list(ctx.parameters)
            made = torch.autograd.grad(ctx.norm.plain(x), wanted, dy, create_graph=True)
            return (made[0], None, None, *made[1:]) if x.requires_grad else (None, None, None, *made)
        dx = torch.empty_like(x)
        totals: list[torch.Tensor] | None = None
        parts = list(zip(x.split(ctx.rows), dy.split(ctx.rows), dx.split(ctx.rows), strict=True))
        for part, incoming, target in shortened(parts):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                out = ctx.norm.plain(leaf)
            found, *of_parameters = gradients_of([out], [leaf, *ctx.parameters], [incoming], allow_unused=False)
            target.copy_(found)
            totals = of_parameters if totals is None else [a + b for a, b in zip(totals, of_parameters, strict=True)]
            del leaf, out, found
        return dx, None, None, *(totals or ())


class LeanNorm:
    """Stands in for one norm's ``forward``."""

    def __init__(self, module: nn.Module, rows: int | None) -> None:
        self.module = module
        self.rows = rows

    def bind(self) -> None:
        self.module.forward = self

    def unbind(self) -> None:
        """Give the norm its own ``forward`` back, unless somebody put another there meanwhile."""
        if vars(self.module).get("forward") is self:
            del self.module.forward

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The norm as it was."""
        return type(self.module).forward(self.module, x)

    def by_rows(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """The same, so many rows at a time: what it makes on its way exists for those alone."""
        out: torch.Tensor | None = None
        for number, part in shortened(list(enumerate(x.split(rows)))):
            made = self.plain(part)
            if out is None:
                out = torch.empty_like(x, dtype=made.dtype)
            out[number * rows : number * rows + len(made)] = made
        assert out is not None
        return out

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The norm's call; anything but one tensor of more rows than a tile has goes to the norm as it was."""
        rows = self.rows
        recorded = torch.compiler.is_compiling() or exporting()
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and not recorded:
            x = args[0]
            rows = auto_rows(x.device) if rows is None else rows
            if x.dim() > 1 and x.shape[-1] and x.numel() // x.shape[-1] > rows:
                flat = x.reshape(-1, x.shape[-1])
                parameters = [p for p in self.module.parameters() if p.requires_grad]
                if torch.is_grad_enabled() and (x.requires_grad or parameters):
                    return _ByRows.apply(flat, self, rows, *parameters).view(x.shape)
                return self.by_rows(flat, rows).view(x.shape)
        return type(self.module).forward(self.module, *args, **kwargs)


def lean_norms(model: nn.Module, rows: int | None, outside: Iterable[nn.Module] = ()) -> list[LeanNorm]:
    """For every norm in the model that transformers writes in plain torch, the last one above the layers among them.

    Args:
        model: whose norms.
        rows: how many at a time; None: as many as a tile has.
        outside: modules whose norms are left as they are.

    Returns:
        One for each, none of which is bound yet.
    """
    left = {id(part) for module in outside for part in modules_of(module)}
    return [LeanNorm(module, rows) for module in modules_of(model) if _is_plain(module) and id(module) not in left]


def _is_plain(module: nn.Module) -> bool:
    cls = type(module)
    return (
        cls.__name__.endswith(("RMSNorm", "LayerNorm"))
        and cls.forward.__module__.startswith("transformers.")
        and not isinstance(module, nn.LayerNorm)  # torch's own keeps its input alone, and SAM's takes channels first
        and "forward" not in vars(module)
        and not module._modules
    )
