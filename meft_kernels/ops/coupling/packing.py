"""Remainders in ``[0, q)`` stored at exactly ``ceil(log2 q)`` bits each.

Eight neighbours along the last dimension share a group: at width w <= 8 a group is ``8 * w`` bits, hence w bytes. The
bytes of all groups are stored plane by plane, so the packed tensor is ``uint8 [bits, rows, ceil(columns / 8)]`` and
each plane is read and written contiguously. Widths above 8 are cut into parts of 8 bits, low part first; every part is
packed the same way and its planes follow the previous part's. Missing columns of the last group are zero.
"""

import math
import sys

import torch
import torch.nn.functional as F

GROUP = 8


def remainder_bits(q: int) -> int:
    """Bits that one remainder in ``[0, q)`` takes: ``ceil(log2 q)``, 0 for q = 1."""
    return (q - 1).bit_length()


def part_widths(bits: int) -> list[int]:
    """Widths of the parts that a remainder of ``bits`` bits is cut into, low part first."""
    return [min(8, bits - start) for start in range(0, bits, 8)]


def packed_shape(shape: torch.Size | tuple[int, ...], q: int) -> tuple[int, int, int]:
    """Shape of the packed remainders of a tensor of ``shape`` (at least one dimension)."""
    columns = shape[-1]
    rows = math.prod(shape[:-1])
    return remainder_bits(q), rows, -(-columns // GROUP)


def _fields(width: int, step: int, stride: int) -> tuple[int, int]:
    """Masks of the lower and the upper one of every two neighbouring fields of ``step * width`` bits.

    A pair starts every ``16 * step`` bits; its upper field starts ``stride`` bits above its lower one.
    """
    field = (1 << (step * width)) - 1
    low = sum(field << start for start in range(0, 64, 16 * step))
    return low, low << stride


# Eight bytes viewed as one int64, each byte holding `width` bits: three steps close (or open) the gaps of `8 - width`
# bits pairwise. These are a few vectorised ops on an eighth of the elements; a loop over the eight columns measured
# four times slower on CPU.
def _squeeze(lanes: torch.Tensor, width: int) -> torch.Tensor:
    for step in (1, 2, 4):
        low, high = _fields(width, step, 8 * step)
        lanes = (lanes & low) | ((lanes & high) >> ((8 - width) * step))
    return lanes


def _spread(words: torch.Tensor, width: int) -> torch.Tensor:
    for step in (4, 2, 1):
        low, high = _fields(width, step, width * step)
        words = (words & low) | ((words & high) << ((8 - width) * step))
    return words


def pack(remainder: torch.Tensor, q: int) -> torch.Tensor:
    """Pack an int32 tensor of remainders in ``[0, q)``, q >= 2, into ``uint8 [bits, rows, ceil(columns / 8)]``."""
    bits, rows, groups = packed_shape(remainder.shape, q)
    packed = torch.empty(bits, rows, groups, dtype=torch.uint8, device=remainder.device)
    remainder = remainder.reshape(rows, remainder.shape[-1])
    if padding := groups * GROUP - remainder.shape[-1]:
        remainder = F.pad(remainder, (0, padding))
    plane = 0
    for width in part_widths(bits):
        part = (remainder >> (8 * (plane // 8))).to(torch.uint8, memory_format=torch.contiguous_format)  # low 8 bits
        words = part.view(-1).view(torch.int64)
        if width < 8:
            words = _squeeze(words, width)
        packed[plane : plane + width] = words.view(torch.uint8).view(rows, groups, 8)[..., :width].movedim(-1, 0)
        plane += width
    return packed


def unpack(packed: torch.Tensor, q: int, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Inverse of :func:`pack`: int32 remainders of ``shape``."""
    bits, rows, groups = packed_shape(shape, q)
    remainder: torch.Tensor | None = None
    plane = 0
    for width in part_widths(bits):
        lanes = packed.new_zeros(rows, groups, 8)
        lanes[..., :width] = packed[plane : plane + width].movedim(0, -1)
        words = lanes.view(-1).view(torch.int64)
        if width < 8:
            words = _spread(words, width)
        part = words.view(torch.uint8).view(rows, groups * GROUP)[:, : shape[-1]].to(torch.int32)
        remainder = part if remainder is None else remainder | (part << (8 * (plane // 8)))
        plane += width
    assert remainder is not None, "q = 1 leaves no remainder to unpack"
    return remainder.reshape(shape)


if sys.byteorder != "little":  # pragma: no cover - torch ships no big-endian GPU build
    raise ImportError("meft_kernels packs remainders through int64 views and needs a little-endian machine")
