"""Dropout masks that are computed, not stored: Philox 4x32-10 of (seed, element number).

The counter of an element is ``row * rank + column`` of the bottleneck, so a mask depends neither on tiles nor on the
device, and backward draws it again. The bits are those of ``tl.randint(seed, counter)``.
"""

from __future__ import annotations

import functools

import torch

_LOW = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = (0xD2511F53, 0xCD9E8D57)


@functools.lru_cache
def drop_threshold(probability: float) -> int:
    """Elements whose 32 random bits are below it are dropped: the probability to the nearest 2^-32."""
    return min(round(probability * 2**32), _LOW)


def signed_seed(seed: int) -> int:
    """Any integer as a signed 64-bit one with the same low 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _multiply(value: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of two 32-bit numbers. int64 is signed, so the factor goes in halves."""
    low, high = value * (factor & 0xFFFF), value * (factor >> 16)  # 48 bits each
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def random_bits(seed: int, counter: torch.Tensor) -> torch.Tensor:
    """32 random bits, as int64, for every element of the int64 ``counter``."""
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(10):
        high2, low2 = _multiply(c2, _ROUNDS[1])
        high0, low0 = _multiply(c0, _ROUNDS[0])
        c0, c2 = high2 ^ c1 ^ key0, high0 ^ c3 ^ key1
        c1, c3 = low2, low0
        key0, key1 = (key0 + _KEYS[0]) & _LOW, (key1 + _KEYS[1]) & _LOW
    return c0


def keep_mask(shape: torch.Size | tuple[int, ...], probability: float, seed: int, device: torch.device) -> torch.Tensor:
    """Which elements of a bottleneck ``[..., rank]`` survive, bool."""
    size = torch.Size(shape).numel()
    counter = torch.arange(size, dtype=torch.int64, device=device)
    return (random_bits(seed, counter) >= drop_threshold(probability)).view(shape)
