"""The public functional ops: argument checks, and the choice between the reference and the Triton kernels."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch

from ...fixed_point import MAX_FRACTION_BITS, Impl, reciprocal
from ..launching import facts, remembered
from . import reference, traced
from .packing import packed_shape
from .types import Coupled, Uncoupled

logger = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@functools.cache
def _warn_fallback(what: str, reason: str) -> None:
    logger.warning("meft_kernels: %s in plain torch instead of Triton: %s", what, reason)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _kernels() -> Any:
    """The Triton module, imported where it is wanted: an import that is done already takes microseconds, too."""
    from . import triton

    return triton


def why_not_triton(*tensors: torch.Tensor | None) -> str | None:
    """The reason why the Triton kernels cannot take these tensors, or None."""
    if not _triton_installed():
        return "triton is not installed"
    present = [tensor for tensor in tensors if tensor is not None]
    return _why_not_these(tuple([tensor.dtype for tensor in present]), present[0].device, _kernels().INTERPRETED)


@remembered
def _why_not_these(dtypes: tuple[torch.dtype, ...], device: torch.device, interpreted: bool) -> str | None:
    if torch.float64 in dtypes:
        return "float64 tensors are not supported"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device}"
    if torch.bfloat16 in dtypes and device.type == "cuda" and not _has_bfloat16(device):
        return "bfloat16 needs compute capability 8.0"
    return None


def use_triton(
    impl: str, *tensors: torch.Tensor | None, obstacle: str | None = None, what: str = "coupling runs"
) -> bool:
    """Whether these tensors go to the Triton kernels. ``obstacle`` is a reason why not that tensors do not show.

    Raises:
        ValueError: an unknown ``impl``.
        RuntimeError: ``impl="triton"`` and the kernels cannot take these tensors.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be 'auto', 'torch' or 'triton', got {impl!r}")
    if impl == "torch":
        return False
    if impl == "auto" and True not in [tensor is not None and tensor.is_cuda for tensor in tensors]:
        return False
    reason = obstacle or why_not_triton(*tensors)
    if reason is None:
        return True
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {reason}; use impl='auto' or impl='torch'")
    _warn_fallback(what, reason)
    return False


def check(
    stream: torch.Tensor,
    branch: torch.Tensor,
    center: torch.Tensor | None,
    fraction_bits: int | None,
    coefficient: float,
    branch_name: str = "branch",
) -> tuple[int, int] | None:
    """Validate one lane; ``(q, sign)`` for exact streams, None for float ones."""
    centers = None if center is None else facts(center)
    given = (facts(stream), facts(branch), centers, fraction_bits, coefficient, branch_name)
    try:
        return _check(*given)
    except TypeError:  # sizes without values (torch.compile's dynamic shapes) have no hash; or it is what it raises
        return _check.__wrapped__(*given)


_Facts = tuple[torch.Size, torch.dtype, torch.device]


@remembered
def _check(
    stream: _Facts,
    branch: _Facts,
    center: _Facts | None,
    fraction_bits: int | None,
    coefficient: float,
    branch_name: str,
) -> tuple[int, int] | None:
    shape, dtype, device = stream
    if not shape:
        raise ValueError("a stream needs at least one dimension")
    for name, other in ((branch_name, branch), ("center", center)):
        if other is not None and (other[0] != shape or other[2] != device):
            raise ValueError(f"{name} is {tuple(other[0])} on {other[2]}, the stream {tuple(shape)} on {device}")
    if branch[1] not in FLOATS:
        raise TypeError(f"{branch_name} must be floating point, got {branch[1]}")
    if center is not None and center[1] != dtype:
        raise TypeError(f"center is {center[1]}, the stream {dtype}")
    if dtype == torch.int32:
        if fraction_bits is None or not 0 <= fraction_bits <= MAX_FRACTION_BITS:
            raise ValueError(f"an int32 stream needs fraction_bits in [0, {MAX_FRACTION_BITS}], got {fraction_bits}")
        return reciprocal(coefficient)
    if dtype not in FLOATS:
        raise TypeError(f"a stream is int32 (exact) or floating point, got {dtype}")
    if fraction_bits is not None:
        raise ValueError("fraction_bits belongs to int32 streams")
    if not coefficient:
        raise ValueError("coefficient 0 has no inverse")
    return None


def check_remainder(
    y: torch.Tensor, remainder: torch.Tensor | None, exact: tuple[int, int] | None, coefficient: float
) -> None:
    """Validate the packed remainders that an inverse was given."""
    q = exact[0] if exact is not None else 1
    if q == 1 and remainder is None:
        return
    expected = packed_shape(y.shape, q) if q > 1 else None
    actual = tuple(remainder.shape) if remainder is not None else None
    if actual != expected:
        raise ValueError(f"coefficient {coefficient} needs remainders of shape {expected}, got {actual}")
    if remainder is not None and (remainder.dtype != torch.uint8 or remainder.device != y.device):
        raise TypeError(f"remainders are uint8 on {y.device}, got {remainder.dtype} on {remainder.device}")


def couple(
    a: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    *,
    center: torch.Tensor | None = None,
    fraction_bits: int | None = None,
    value_dtype: torch.dtype | None = None,
    inplace: bool = False,
    first_row: int = 0,
    impl: Impl = "auto",
) -> Coupled:
    """One lane of the coupling: ``y = branch + coefficient * (a - center)``.

    Args:
        a: the stream, int32 (exact, fixed point) or floating point, any shape with at least one dimension.
        branch: F(x2) or G(y1), floating point, shape of ``a``.
        coefficient: lambda or beta. Exact streams take +-1/q for any integer q >= 1.
        center: the other stream, dtype and shape of ``a``; None for the paper's coupling.
        fraction_bits: k of the fixed point, 0..28; int32 streams only.
        value_dtype: dtype in which a copy of ``y`` is wanted, or None.
        inplace: write ``y`` over ``a``.
        first_row: place of the first row in the whole, where ``a`` is some rows of a stream: the checksums of all its
            parts then add up to that of the whole.
        impl: "auto" takes Triton on CUDA and torch elsewhere.

    Not differentiable: the reversible layer supplies the gradient (rounding counts as identity).

    Raises:
        ValueError, TypeError: arguments that do not fit together, before anything is written.
    """
    if torch.compiler.is_compiling():
        return traced.couple(a, branch, coefficient, center, fraction_bits, value_dtype, inplace, first_row, impl)
    return couple_now(a, branch, coefficient, center, fraction_bits, value_dtype, inplace, first_row, impl)


def couple_now(
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
    """:func:`couple`, computed here and not left to a graph."""
    exact = check(a, branch, center, fraction_bits, coefficient)
    if use_triton(impl, a, branch, center):
        return _kernels().couple(a, branch, coefficient, exact, center, fraction_bits, value_dtype, inplace, first_row)
    with torch.no_grad():
        if exact is not None and fraction_bits is not None:
            q, sign = exact
            return reference.couple_exact(a, branch, q, sign, center, fraction_bits, value_dtype, inplace, first_row)
        return reference.couple_float(a, branch, coefficient, center, value_dtype, inplace)


def uncouple(
    y: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    remainder: torch.Tensor | None = None,
    *,
    center: torch.Tensor | None = None,
    fraction_bits: int | None = None,
    value_dtype: torch.dtype | None = None,
    inplace: bool = False,
    first_row: int = 0,
    impl: Impl = "auto",
) -> Uncoupled:
    """Inverse of :func:`couple`: ``a = center + (y - branch) / coefficient``, bit for bit on int32 streams.

    Args:
        y: the stream that ``couple`` returned.
        branch, coefficient, center, fraction_bits: as they were given to ``couple``.
        remainder: what ``couple`` returned; None for float streams and for q = 1.
        value_dtype, inplace, first_row, impl: as for ``couple``.

    Raises:
        ValueError, TypeError: arguments that do not fit together, before anything is written.
    """
    if torch.compiler.is_compiling():
        return traced.uncouple(
            y, branch, coefficient, remainder, center, fraction_bits, value_dtype, inplace, first_row, impl
        )
    return uncouple_now(y, branch, coefficient, remainder, center, fraction_bits, value_dtype, inplace, first_row, impl)


def uncouple_now(
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
    """:func:`uncouple`, computed here and not left to a graph."""
    exact = check(y, branch, center, fraction_bits, coefficient)
    check_remainder(y, remainder, exact, coefficient)
    if use_triton(impl, y, branch, center):
        return _kernels().uncouple(
            y, branch, coefficient, exact, remainder, center, fraction_bits, value_dtype, inplace, first_row
        )
    with torch.no_grad():
        if exact is not None and fraction_bits is not None:
            q, sign = exact
            return reference.uncouple_exact(
                y, branch, q, sign, remainder, center, fraction_bits, value_dtype, inplace, first_row
            )
        return reference.uncouple_float(y, branch, coefficient, center, value_dtype, inplace)
