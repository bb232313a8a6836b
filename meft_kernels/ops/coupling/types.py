"""What the coupling ops return, and the constants that every implementation shares."""

from __future__ import annotations

from typing import NamedTuple

import torch

INT_LIMIT = 2**30
"""Every stream element stays strictly inside +-2^30, so the difference of two streams cannot wrap in int32."""

NON_FINITE = 1
"""Status bit: a NaN or an infinity was met."""

OVERFLOW = 2
"""Status bit: a stream element would leave +-INT_LIMIT."""


class Coupled(NamedTuple):
    """Result of :func:`~meft_kernels.ops.couple`."""

    y: torch.Tensor
    """The new stream, in the dtype and shape of ``a``."""
    value: torch.Tensor | None
    """``y`` as ``value_dtype``, a fresh contiguous tensor; None if no ``value_dtype`` was asked for."""
    remainder: torch.Tensor | None
    """Packed remainders, ``uint8 [bits, rows, ceil(columns / 8)]``; None for float streams and for q = 1."""
    checksum: torch.Tensor
    """Of ``y``, int64 scalar; see :func:`~meft_kernels.ops.checksum`. 0 for float streams."""
    status: torch.Tensor
    """int32 scalar, NON_FINITE | OVERFLOW bits; 0 when all is well. ``y`` is meaningless otherwise."""


class Uncoupled(NamedTuple):
    """Result of :func:`~meft_kernels.ops.uncouple`."""

    a: torch.Tensor
    """The rebuilt stream, in the dtype and shape of ``y``."""
    value: torch.Tensor | None
    """``a`` as ``value_dtype``; None if no ``value_dtype`` was asked for."""
    checksum: torch.Tensor
    """Of ``a``, int64 scalar; 0 for float streams."""
