"""The public adapter ops: argument checks, and the choice between the reference and the Triton kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...engine.replay import draw_seed
from ...fixed_point import Impl
from ..coupling.api import check_remainder
from ..coupling.types import Coupled, Uncoupled
from . import reference, traced
from .checks import check_adapter, check_gradient, check_lane, check_like, seed_of, use_triton
from .types import AdapterWeights, UncoupledBackward


@functools.cache
def _forward_kernels() -> Any:
    """Imported where they are wanted: an import that is done already takes microseconds, too."""
    from . import triton_forward

    return triton_forward


@functools.cache
def _backward_kernels() -> Any:
    from . import triton_backward

    return triton_backward


def _contiguous(remainder: torch.Tensor | None) -> torch.Tensor | None:
    return None if remainder is None else remainder.contiguous()


class _Adapter(torch.autograd.Function):
    """``[residual +] adapter(x)``, which keeps x and the weights and computes the bottleneck again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor,
        up: torch.Tensor,
        up_bias: torch.Tensor,
        settings: tuple[int, float, int, bool],
    ) -> torch.Tensor:
        weights = AdapterWeights(down, down_bias, up, up_bias)
        ctx.save_for_backward(x, *weights)
        ctx.settings = settings
        activation, dropout, seed, fused = settings
        if fused:
            return _forward_kernels().adapter(x, weights, activation, dropout, seed, residual)
        return reference.adapter(x, weights, activation, dropout, seed, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        activation, dropout, seed, fused = ctx.settings
        residual = dy if ctx.needs_input_grad[1] else None
        needs = ctx.needs_input_grad
        if not (needs[0] or any(needs[2:6])):
            return None, residual, None, None, None, None, None
        dx, gradients = _backward(dy, x, AdapterWeights(*weights), activation, dropout, seed, 0.0, None, fused)
        found = [gradient if need else None for gradient, need in zip(gradients, needs[2:6], strict=True)]
        return dx if needs[0] else None, residual, *found, None


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: int,
    dropout: float,
    seed: int,
    skip: float,
    dx_into: torch.Tensor | None,
    fused: bool,
) -> tuple[torch.Tensor, AdapterWeights]:
    if fused:
        return _backward_kernels().adapter_backward(dy, x, weights, activation, dropout, seed, skip, dx_into)
    with torch.no_grad():
        return reference.adapter_backward(dy, x, weights, activation, dropout, seed, skip, dx_into)


def adapter_forward(
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: str,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """``up(dropout(activation(down(x))))``, ``[..., H]`` to ``[..., H]`` in the dtype of x; differentiable once.

    Args:
        x: floating point, at least one dimension; any strides.
        weights: of width H, in the dtype of x, or float32 beside 16-bit x.
        activation: transformers' name of gelu (exact or tanh), relu or silu; see ``ACTIVATIONS``.
        dropout: probability that an element of the bottleneck is dropped; the others grow by 1 / (1 - dropout).
        seed: any integer; the mask depends on it and on the element's place alone. None draws one from torch's
            global generator.
        impl: "auto" takes Triton on CUDA and torch elsewhere. The kernels take ranks up to 256, no float64.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        RuntimeError: ``impl="triton"`` and the kernels cannot take these tensors.
    """
    if torch.compiler.is_compiling():
        return traced.parallel_adapter(x, None, weights, activation, dropout, seed, impl)
    number = check_adapter(x, weights, activation, dropout)
    seed = seed_of(dropout, draw_seed() if seed is None and dropout else seed)
    fused = use_triton(impl, weights[0].shape[0], x, *weights)
    return _Adapter.apply(x, None, *weights, (number, dropout, seed, fused))


def parallel_adapter(
    x: torch.Tensor,
    residual: torch.Tensor,
    weights: AdapterWeights,
    activation: str,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """``residual + adapter(x)`` in one pass, differentiable once; keeps only x and the weights for backward.

    ``residual`` has the shape and the dtype of x; everything else is as for :func:`adapter_forward`.
    """
    if torch.compiler.is_compiling():
        return traced.parallel_adapter(x, residual, weights, activation, dropout, seed, impl)
    number = check_adapter(x, weights, activation, dropout)
    check_like("residual", residual, x, "x")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}, x {x.dtype}")
    seed = seed_of(dropout, draw_seed() if seed is None and dropout else seed)
    fused = use_triton(impl, weights[0].shape[0], x, residual, *weights)
    return _Adapter.apply(x, residual, *weights, (number, dropout, seed, fused))


def adapter_couple(
    a: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: str,
    coefficient: float,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    center: torch.Tensor | None = None,
    residual: bool = False,
    fraction_bits: int | None = None,
    value_dtype: torch.dtype | None = None,
    inplace: bool = False,
    impl: Impl = "auto",
) -> Coupled:
    """``couple(a, adapter(x) [+ x], coefficient, ...)`` in which the branch never touches memory.

    Args:
        a: the stream, int32 (exact, fixed point) or floating point, shape of x.
        x: the branch's input, in the model's dtype.
        weights, activation, dropout, impl: as for :func:`adapter_forward`.
        coefficient, center, fraction_bits, value_dtype, inplace: as for ``meft_kernels.ops.couple``.
        seed: needed with dropout, and the inverse needs the same.
        residual: the branch is ``x + adapter(x)``.

    A NaN or an infinity in x, in the bottleneck or in the branch is flagged in ``status``. Not differentiable: the
    reversible layer supplies the gradient.

    Raises:
        ValueError, TypeError: arguments that do not fit together, before anything is written.
        RuntimeError: ``impl="triton"`` and the kernels cannot take these tensors.
    """
    if torch.compiler.is_compiling():
        return traced.adapter_couple(
            a, x, weights, activation, coefficient, dropout=dropout, seed=seed, center=center, residual=residual,
            fraction_bits=fraction_bits, value_dtype=value_dtype, inplace=inplace, impl=impl,
        )  # fmt: skip
    number = check_adapter(x, weights, activation, dropout)
    lane = check_lane(a, x, coefficient, center, fraction_bits, value_dtype, inplace)
    branch = (x, AdapterWeights(*weights), number, dropout, seed_of(dropout, seed), residual)
    if use_triton(impl, weights[0].shape[0], a, x, center, *weights):
        return _forward_kernels().adapter_couple(a, *branch, lane)
    with torch.no_grad():
        return reference.adapter_couple(a, *branch, lane)


def adapter_uncouple(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: str,
    coefficient: float,
    remainder: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    center: torch.Tensor | None = None,
    residual: bool = False,
    fraction_bits: int | None = None,
    value_dtype: torch.dtype | None = None,
    inplace: bool = False,
    impl: Impl = "auto",
) -> Uncoupled:
    """Inverse of :func:`adapter_couple` of the same ``impl``, bit for bit on int32 streams.

    Args:
        y: the stream that ``adapter_couple`` returned.
        remainder: what it returned; None for float streams and for q = 1.

    All else as it was given to ``adapter_couple``. Torch and Triton sum products in different orders: one cannot undo
    exactly what the other did.

    Raises:
        ValueError, TypeError: arguments that do not fit together, before anything is written.
        RuntimeError: ``impl="triton"`` and the kernels cannot take these tensors.
    """
    number = check_adapter(x, weights, activation, dropout)
    lane = check_lane(y, x, coefficient, center, fraction_bits, value_dtype, inplace)
    check_remainder(y, remainder, lane.exact, coefficient)
    branch = (x, AdapterWeights(*weights), number, dropout, seed_of(dropout, seed), residual)
    if use_triton(impl, weights[0].shape[0], y, x, center, *weights):
        done = _forward_kernels().couple(True, y, *branch, _contiguous(remainder), lane)
        return Uncoupled(done.out, done.value, done.checksum)
    with torch.no_grad():
        return reference.adapter_uncouple(y, *branch, remainder, lane)


def adapter_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: str,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    residual: bool = False,
    dx_into: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, AdapterWeights]:
    """Gradients of ``sum(dy * (adapter(x) [+ x]))``: that of x, and those of the weights in the weights' dtype.

    Args:
        dy: shape of x, floating point; used in the dtype of x. Never written.
        x, weights, activation, dropout, seed, residual, impl: as for :func:`adapter_couple`.
        dx_into: a tensor that the gradient of x is added into and that is returned; None makes a new one.

    Raises:
        ValueError, TypeError: arguments that do not fit together, before anything is written.
        RuntimeError: ``impl="triton"`` and the kernels cannot take these tensors.
    """
    number = check_adapter(x, weights, activation, dropout)
    check_gradient(dy, x, dx_into)
    fused = use_triton(impl, weights[0].shape[0], dy, x, dx_into, *weights)
    skip = 1.0 if residual else 0.0
    return _backward(dy, x, AdapterWeights(*weights), number, dropout, seed_of(dropout, seed), skip, dx_into, fused)


def adapter_uncouple_backward(
    y: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: str,
    coefficient: float,
    remainder: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    center: torch.Tensor | None = None,
    residual: bool = False,
    fraction_bits: int | None = None,
    value_dtype: torch.dtype | None = None,
    inplace: bool = False,
    dx_into: torch.Tensor | None = None,
    through_center: bool = False,
    impl: Impl = "auto",
) -> UncoupledBackward:
    """:func:`adapter_uncouple` and :func:`adapter_backward` in one pass over the streams.

    Args:
        y, x, weights, activation, coefficient, remainder, dropout, seed: as for :func:`adapter_uncouple`.
        center, residual, fraction_bits, value_dtype, inplace, impl: as for :func:`adapter_uncouple`.
        dy: gradient of y, shape of x, floating point; used in the dtype of x. Never written.
        dx_into: a tensor that the gradient of x is added into and that is returned as ``dx``.
        through_center: x is a copy of ``center``, so ``-coefficient * dy``, the gradient through the center, belongs to
            ``dx`` as well. The gradient of a, ``coefficient * dy``, is left to the caller.

    Raises:
        ValueError, TypeError: arguments that do not fit together, before anything is written.
        RuntimeError: ``impl="triton"`` and the kernels cannot take these tensors.
    """
    if torch.compiler.is_compiling():
        return traced.adapter_uncouple_backward(
            y, dy, x, weights, activation, coefficient, remainder, dropout=dropout, seed=seed, center=center,
            residual=residual, fraction_bits=fraction_bits, value_dtype=value_dtype, inplace=inplace, dx_into=dx_into,
            through_center=through_center, impl=impl,
        )  # fmt: skip
    number = check_adapter(x, weights, activation, dropout)
    lane = check_lane(y, x, coefficient, center, fraction_bits, value_dtype, inplace)
    check_remainder(y, remainder, lane.exact, coefficient)
    check_gradient(dy, x, dx_into)
    if through_center and center is None:
        raise ValueError("through_center needs a center")
    weights = AdapterWeights(*weights)
    drop = (number, dropout, seed_of(dropout, seed))
    skip = (1.0 if residual else 0.0) - (coefficient if through_center else 0.0)
    if use_triton(impl, weights[0].shape[0], y, dy, x, center, dx_into, *weights):
        stream = _forward_kernels().StreamTensors(y, lane)
        dx, gradients = _backward_kernels().adapter_backward(
            dy, x, weights, *drop, skip, dx_into, stream, _contiguous(remainder), residual
        )
        stream.finish()
        return UncoupledBackward(stream.out, stream.value, stream.checksum, dx, gradients)
    with torch.no_grad():
        undone = reference.adapter_uncouple(y, x, weights, *drop, residual, remainder, lane)
        dx, gradients = reference.adapter_backward(dy, x, weights, *drop, skip, dx_into)
    return UncoupledBackward(*undone, dx, gradients)
