"""The coupling step in plain torch: the executable specification of every other implementation.

Integers are the same on every backend and in every implementation: scaling by a power of two is exact, rounding is to
nearest even, division floors. Nothing here allocates less than it could; clarity comes first.
"""

from __future__ import annotations

import torch

from .checksum import checksum
from .packing import pack, unpack
from .types import INT_LIMIT, NON_FINITE, OVERFLOW, Coupled, Uncoupled


def _accumulation_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def quantise(values: torch.Tensor, fraction_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``round(values * 2^k)`` as int32, and the status flags of the conversion (int32 scalar)."""
    scaled = values.to(_accumulation_dtype(values)) * 2.0**fraction_bits
    if scaled.numel() == 0:
        return scaled.to(torch.int32), torch.zeros((), dtype=torch.int32, device=values.device)
    low, high = torch.aminmax(scaled)  # one pass, and NaN propagates
    overflow = ~((low > -INT_LIMIT) & (high < INT_LIMIT))
    non_finite = ~(torch.isfinite(low) & torch.isfinite(high))
    status = overflow.to(torch.int32) * OVERFLOW | non_finite.to(torch.int32) * NON_FINITE
    return scaled.round_().to(torch.int32), status


def dequantise(stream: torch.Tensor, fraction_bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The value of a fixed-point stream in ``dtype``; int32 -> float32 rounds to nearest even past 2^24."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return stream.to(wide, memory_format=torch.contiguous_format).mul_(2.0**-fraction_bits).to(dtype)


def _divide(d: torch.Tensor, q: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Floor division by ``q`` >= 2 and its remainder in ``[0, q)``."""
    if q & (q - 1) == 0:
        return d >> (q.bit_length() - 1), d & (q - 1)
    t = torch.div(d, q, rounding_mode="floor")
    return t, d - t * q


def _range_status(stream: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(stream)
    return ((low <= -INT_LIMIT) | (high >= INT_LIMIT)).to(torch.int32) * OVERFLOW


def couple_exact(
    a: torch.Tensor,
    branch: torch.Tensor,
    q: int,
    sign: int,
    center: torch.Tensor | None,
    fraction_bits: int,
    value_dtype: torch.dtype | None,
    inplace: bool,
    first_row: int = 0,
) -> Coupled:
    """See :func:`meft_kernels.ops.couple`, int32 streams."""
    d = a - center if center is not None else a
    y, status = quantise(branch, fraction_bits)
    remainder = None
    if q > 1:
        d, rest = _divide(d, q)
        remainder = pack(rest, q)
    y.add_(d, alpha=sign)
    if y.numel():
        status = status | _range_status(y)
    if inplace:
        y = a.copy_(y)
    value = None if value_dtype is None else dequantise(y, fraction_bits, value_dtype)
    return Coupled(y, value, remainder, checksum(y, first_row), status)


def uncouple_exact(
    y: torch.Tensor,
    branch: torch.Tensor,
    q: int,
    sign: int,
    remainder: torch.Tensor | None,
    center: torch.Tensor | None,
    fraction_bits: int,
    value_dtype: torch.dtype | None,
    inplace: bool,
    first_row: int = 0,
) -> Uncoupled:
    """See :func:`meft_kernels.ops.uncouple`, int32 streams."""
    d = (y - quantise(branch, fraction_bits)[0]).mul_(sign * q)
    if remainder is not None:
        d.add_(unpack(remainder, q, d.shape))
    if center is not None:
        d.add_(center)
    a = y.copy_(d) if inplace else d
    value = None if value_dtype is None else dequantise(a, fraction_bits, value_dtype)
    return Uncoupled(a, value, checksum(a, first_row))


def couple_float(
    a: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    center: torch.Tensor | None,
    value_dtype: torch.dtype | None,
    inplace: bool,
) -> Coupled:
    """See :func:`meft_kernels.ops.couple`, floating-point streams."""
    wide = _accumulation_dtype(a, branch)
    d = a.to(wide)
    if center is not None:
        d = d - center.to(wide)
    y = (branch.to(wide) + d * coefficient).to(a.dtype)
    status = (~torch.isfinite(y)).any().to(torch.int32) * NON_FINITE
    if inplace:
        y = a.copy_(y)
    return Coupled(y, _value(y, value_dtype), None, _no_checksum(a), status)


def uncouple_float(
    y: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    center: torch.Tensor | None,
    value_dtype: torch.dtype | None,
    inplace: bool,
) -> Uncoupled:
    """See :func:`meft_kernels.ops.uncouple`, floating-point streams."""
    wide = _accumulation_dtype(y, branch)
    a = (y.to(wide) - branch.to(wide)) / coefficient
    if center is not None:
        a = a + center.to(wide)
    a = y.copy_(a) if inplace else a.to(y.dtype)
    return Uncoupled(a, _value(a, value_dtype), _no_checksum(y))


def _value(stream: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
    return None if dtype is None else stream.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _no_checksum(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64, device=like.device)
