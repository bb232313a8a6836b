"""What fixed point can hold: fraction bits and coefficients. Without torch, since settings are checked by it."""

from typing import Literal

Impl = Literal["auto", "torch", "triton"]
"""Who computes an op: its reference in plain torch, its Triton kernel, or the kernel wherever it runs."""

MAX_FRACTION_BITS = 28
_MAX_Q = 2**31 - 1


def reciprocal(coefficient: float) -> tuple[int, int]:
    """``(q, sign)`` with ``coefficient == sign / q``, what exact arithmetic can hold.

    Raises:
        ValueError: the coefficient is not +-1/q for an integer q >= 1; the message names the nearest that is.
    """
    if not coefficient or coefficient != coefficient or abs(coefficient) > 1:
        nearest = "0 has no inverse" if not coefficient else f"the nearest is {'-' if coefficient < 0 else ''}1.0"
        raise ValueError(
            f"exact arithmetic needs a coefficient of +-1/q with an integer q >= 1, got {coefficient}: {nearest}"
        )
    sign = 1 if coefficient > 0 else -1
    q = round(min(1 / abs(coefficient), _MAX_Q))  # 1 / 1e-320 is infinity
    # A user writes 0.1 or 1/3: accept what double rounding of 1/q allows, nothing more.
    if abs(coefficient * q - sign) > 1e-9:
        q = min((q, q + 1), key=lambda near: abs(1 / near - abs(coefficient)))  # 0.7 lies nearer 1/2 than 1
        raise ValueError(
            f"exact arithmetic needs a coefficient of +-1/q with an integer q >= 1, got {coefficient}: "
            f"the nearest is {sign / q} (q = {q}); or use arithmetic='float'"
        )
    return q, sign
