"""The checksum of an int32 stream: what its rebuilt twin must give again.

    sum over all rows r and columns c of  stream[r, c] * w(~r) * w(c)   mod 2^64

w gives every place an odd 32-bit number. As it is odd, a single element that differs always shows; as places have
weights of their own, so do rows, columns or tiles that changed places, which leave a plain sum as it is. Rows and
columns take theirs from different places (~r is -1 - r), or a transposed block would not show.

Integers wrap, so any order of summation gives the same bits, and the checksums of parts of a stream add up to that of
the whole, if each part knows which row of the whole is its first.
"""

from __future__ import annotations

import torch

from ...memory import shortened

FACTOR = 0x9E3779B1 - 2**32
"""2^32 / golden ratio as a signed number: its multiples, mod 2^32, are far from each other."""

_WIDENED = {"cpu": 2**17}
_WIDENED_ELSEWHERE = 2**22
"""Elements that exist as int64 at a time: what stays in a cache, or what keeps a GPU busy."""


def weights(first: int, stop: int, device: torch.device) -> torch.Tensor:
    """Weights of the places from ``first`` up to ``stop``, or down to it; int32."""
    places = torch.arange(first, stop, 1 if stop >= first else -1, dtype=torch.int32, device=device)
    hashed = places.mul_(FACTOR)
    return hashed.bitwise_xor_(hashed >> 15).bitwise_or_(1)


def checksum(stream: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """Checksum of an int32 tensor with at least one dimension, as an int64 scalar.

    Args:
        stream: any strides; rows run along its last dimension.
        first_row: place of its first row in the whole, where it is a part of a stream.
    """
    columns = stream.shape[-1]
    if not stream.numel():
        return torch.zeros((), dtype=torch.int64, device=stream.device)
    lines = stream.reshape(-1, columns)
    rows = lines.shape[0]
    sums = _line_sums(lines, weights(0, columns, stream.device))
    return sums.mul_(weights(~first_row, ~(first_row + rows), stream.device)).sum()


def _line_sums(lines: torch.Tensor, of_columns: torch.Tensor) -> torch.Tensor:
    """``lines @ of_columns``, int64, a few lines at a time."""
    step = max(1, _WIDENED.get(lines.device.type, _WIDENED_ELSEWHERE) // lines.shape[1])
    if lines.shape[0] <= step:
        return lines.to(torch.int64).mul_(of_columns).sum(1)
    sums = torch.empty(lines.shape[0], dtype=torch.int64, device=lines.device)
    for some, into in shortened(list(zip(lines.split(step), sums.split(step), strict=True))):
        torch.sum(some.to(torch.int64).mul_(of_columns), 1, out=into)
    return sums
