"""The adapter ops while a graph is made of them: one node each, by the operators that ``library`` registers."""

from __future__ import annotations

from typing import Any

import torch

from ...fixed_point import reciprocal
from ..coupling.types import Coupled
from .types import AdapterWeights, UncoupledBackward


def parallel_adapter(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weights: AdapterWeights,
    activation: str,
    dropout: float,
    seed: int | None,
    impl: str,
) -> torch.Tensor:
    """``[residual +] adapter(x)`` as one node of a graph.

    Raises:
        ValueError: dropout without a seed; drawing one would be done once, when the graph is made.
    """
    if dropout and seed is None:
        raise ValueError("under torch.compile dropout needs a seed, or every call would drop the same elements")
    return torch.ops.meft_kernels.parallel_adapter(
        x, residual, *weights, activation, float(dropout), seed or 0, impl
    )  # fmt: skip


def adapter_couple(
    a: torch.Tensor, x: torch.Tensor, weights: AdapterWeights, activation: str, coefficient: float, **settings: Any
) -> Coupled:
    """:func:`~meft_kernels.ops.adapter_couple` as one node of a graph; ``inplace`` costs a copy there."""
    y, value, remainder, checksum, status = torch.ops.meft_kernels.adapter_couple(
        a, x, *weights, settings["center"], activation, float(coefficient), float(settings["dropout"]),
        settings["seed"], settings["residual"], settings["fraction_bits"], settings["value_dtype"], settings["impl"],
    )  # fmt: skip
    has_remainder = settings["fraction_bits"] is not None and reciprocal(coefficient)[0] > 1
    return Coupled(
        a.copy_(y) if settings["inplace"] else y,
        None if settings["value_dtype"] is None else value,
        remainder if has_remainder else None,
        checksum,
        status,
    )


def adapter_uncouple_backward(
    y: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: str,
    coefficient: float,
    remainder: torch.Tensor | None,
    **settings: Any,
) -> UncoupledBackward:
    """:func:`~meft_kernels.ops.adapter_uncouple_backward` as one node; ``inplace`` and ``dx_into`` copy there."""
    a, value, checksum, dx, *gradients = torch.ops.meft_kernels.adapter_uncouple_backward(
        y, dy, x, *weights, remainder, settings["center"], activation, float(coefficient), float(settings["dropout"]),
        settings["seed"], settings["residual"], settings["fraction_bits"], settings["value_dtype"],
        settings["through_center"], settings["impl"],
    )  # fmt: skip
    if settings["dx_into"] is not None:
        dx = settings["dx_into"].add_(dx)
    return UncoupledBackward(
        y.copy_(a) if settings["inplace"] else a,
        None if settings["value_dtype"] is None else value,
        checksum,
        dx,
        AdapterWeights(*gradients),
    )
