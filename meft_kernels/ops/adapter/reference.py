"""The adapter in plain torch: the specification of the kernels, and what runs where they cannot.

Without dropout :func:`adapter` has the bits of ``meft_kernels.engine.adapters.Adapter``. The kernels keep ``pre`` and
what follows in fp32 up to ``z``; here they are rounded to the dtype of ``x``, as every torch op does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..coupling import reference as coupling
from ..coupling.types import NON_FINITE, OVERFLOW, Coupled, Uncoupled
from .dropout import keep_mask
from .types import GELU, GELU_TANH, RELU, AdapterWeights, Coupling


def activate(pre: torch.Tensor, activation: int) -> torch.Tensor:
    """The activation (a value of ``ACTIVATIONS``) of ``pre``."""
    if activation == RELU:
        return F.relu(pre)
    if activation in (GELU, GELU_TANH):
        return F.gelu(pre, approximate="tanh" if activation == GELU_TANH else "none")
    return F.silu(pre)


def _activate_backward(gradient: torch.Tensor, pre: torch.Tensor, activation: int) -> torch.Tensor:
    if activation == RELU:
        return torch.ops.aten.threshold_backward(gradient, pre, 0)
    if activation in (GELU, GELU_TANH):
        approximate = "tanh" if activation == GELU_TANH else "none"
        return torch.ops.aten.gelu_backward(gradient, pre, approximate=approximate)
    return torch.ops.aten.silu_backward(gradient, pre)


def _drop(values: torch.Tensor, keep: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return values if keep is None else values * keep * (1 / (1 - dropout))


def _cast(weights: AdapterWeights, dtype: torch.dtype) -> AdapterWeights:
    return AdapterWeights(*(weight.to(dtype) for weight in weights))


def _bottleneck(
    x: torch.Tensor, weights: AdapterWeights, activation: int, dropout: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``pre``, ``z`` and the mask of kept elements. ``weights`` in the dtype of ``x``."""
    pre = F.linear(x, weights.down, weights.down_bias)
    keep = keep_mask(pre.shape, dropout, seed, x.device) if dropout else None
    return pre, _drop(activate(pre, activation), keep, dropout), keep


def adapter(
    x: torch.Tensor, weights: AdapterWeights, activation: int, dropout: float, seed: int, residual: torch.Tensor | None
) -> torch.Tensor:
    """``[..., H]`` to ``[..., H]``, in the dtype of ``x``; differentiable."""
    weights = _cast(weights, x.dtype)
    _, z, _ = _bottleneck(x, weights, activation, dropout, seed)
    out = F.linear(z, weights.up, weights.up_bias)
    return out if residual is None else residual + out


def adapter_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: int,
    dropout: float,
    seed: int,
    skip: float,
    dx_into: torch.Tensor | None,
) -> tuple[torch.Tensor, AdapterWeights]:
    """Gradients of ``sum(dy * adapter(x))``; ``skip * dy`` is added to the first."""
    cast = _cast(weights, x.dtype)
    dy = dy.to(x.dtype)
    pre, z, keep = _bottleneck(x, cast, activation, dropout, seed)
    d_pre = _activate_backward(_drop(dy @ cast.up, keep, dropout), pre, activation)
    dx = d_pre @ cast.down
    if skip:
        dx.add_(dy, alpha=skip)
    if dx_into is not None:
        dx = dx_into.add_(dx)
    # Sums over all rows: 16-bit would lose what fp32 weights are kept for.
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = [tensor.reshape(-1, tensor.shape[-1]).to(wide) for tensor in (dy, x, z, d_pre)]
    dy, x, z, d_pre = rows
    gradients = (d_pre.mT @ x, d_pre.sum(0), dy.mT @ z, dy.sum(0))
    return dx, AdapterWeights(*(each.to(weight.dtype) for each, weight in zip(gradients, weights, strict=True)))


def adapter_couple(
    a: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: int,
    dropout: float,
    seed: int,
    residual: bool,
    lane: Coupling,
) -> Coupled:
    """See :func:`~meft_kernels.ops.adapter.api.adapter_couple`."""
    weights = _cast(weights, x.dtype)
    pre, z, _ = _bottleneck(x, weights, activation, dropout, seed)
    branch = F.linear(z, weights.up, weights.up_bias)
    if residual:
        branch += x
    coefficient, exact, center, fraction_bits, value_dtype, inplace = lane
    if exact is not None and fraction_bits is not None:
        coupled = coupling.couple_exact(a, branch, *exact, center, fraction_bits, value_dtype, inplace)
    else:
        coupled = coupling.couple_float(a, branch, coefficient, center, value_dtype, inplace)
    # relu turns -inf into 0: look at what it was given
    flags = NON_FINITE if exact is None else NON_FINITE | OVERFLOW
    return coupled._replace(status=coupled.status | (~torch.isfinite(pre)).any().to(torch.int32) * flags)


def adapter_uncouple(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: AdapterWeights,
    activation: int,
    dropout: float,
    seed: int,
    residual: bool,
    remainder: torch.Tensor | None,
    lane: Coupling,
) -> Uncoupled:
    """See :func:`~meft_kernels.ops.adapter.api.adapter_uncouple`."""
    branch = adapter(x, weights, activation, dropout, seed, None)
    if residual:
        branch += x
    coefficient, exact, center, fraction_bits, value_dtype, inplace = lane
    if exact is not None and fraction_bits is not None:
        return coupling.uncouple_exact(y, branch, *exact, remainder, center, fraction_bits, value_dtype, inplace)
    return coupling.uncouple_float(y, branch, coefficient, center, value_dtype, inplace)
