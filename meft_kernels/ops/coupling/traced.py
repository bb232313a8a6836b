"""The coupling ops while a graph is made of them: one node each, by the operators that ``library`` registers."""

from __future__ import annotations

import torch

from ...fixed_point import reciprocal
from .types import Coupled, Uncoupled


def couple(
    a: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    center: torch.Tensor | None,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    inplace: bool,
    first_row: int,
    impl: str,
) -> Coupled:
    """:func:`~meft_kernels.ops.couple` as one node of a graph."""
    arguments = (a, branch, center, float(coefficient), fraction_bits, value_dtype, first_row, impl)
    if inplace:
        value, remainder, checksum, status = torch.ops.meft_kernels.couple_(*arguments)
        y = a
    else:
        y, value, remainder, checksum, status = torch.ops.meft_kernels.couple(*arguments)
    has_remainder = fraction_bits is not None and reciprocal(coefficient)[0] > 1
    return Coupled(y, None if value_dtype is None else value, remainder if has_remainder else None, checksum, status)


def uncouple(
    y: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    remainder: torch.Tensor | None,
    center: torch.Tensor | None,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    inplace: bool,
    first_row: int,
    impl: str,
) -> Uncoupled:
    """:func:`~meft_kernels.ops.uncouple` as one node of a graph."""
    arguments = (y, branch, remainder, center, float(coefficient), fraction_bits, value_dtype, first_row, impl)
    if inplace:
        value, checksum = torch.ops.meft_kernels.uncouple_(*arguments)
        a = y
    else:
        a, value, checksum = torch.ops.meft_kernels.uncouple(*arguments)
    return Uncoupled(a, None if value_dtype is None else value, checksum)
