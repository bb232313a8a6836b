"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from typing import Any

GIB = 2**30
_UNITS = {"GB": 10**9, "GIB": GIB, "MB": 10**6, "MIB": 2**20}


def memory_size(size: Any, name: str = "--gpu") -> int:
    """Bytes of ``80GB`` (10^9 bytes each), ``79.1GiB`` or a number of bytes.

    Args:
        name: of what the size was given for, for the message.

    Raises:
        ValueError: it is no size, or nothing.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = size if isinstance(size, str) else ""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([GM]i?B)\s*", text, re.IGNORECASE)
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not count:
        raise ValueError(f"{name} is a size such as 80GB or 79.1GiB, or a whole number of bytes, not {size!r}")
    return count


def gib(value: int) -> str:
    """GiB, or MiB where those are few."""
    return f"{value / GIB:,.2f} GiB" if abs(value) >= GIB / 10 else f"{value / 2**20:,.2f} MiB"
