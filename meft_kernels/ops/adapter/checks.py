"""What the adapter ops refuse, and whether the kernels can serve a call."""

from __future__ import annotations

import torch

from ..coupling import api as coupling
from ..launching import facts, remembered
from .types import ACTIVATIONS, MAX_RANK, AdapterWeights, Coupling


def use_triton(impl: str, rank: int, *tensors: torch.Tensor | None) -> bool:
    """Whether a call goes to the kernels; see :func:`meft_kernels.ops.coupling.api.use_triton`."""
    return coupling.use_triton(impl, *tensors, obstacle=_rank_obstacle(rank), what="adapters run")


def _rank_obstacle(rank: int) -> str | None:
    return f"rank {rank} is above {MAX_RANK}" if rank > MAX_RANK else None


def why_not_fused(x: torch.Tensor, weights: AdapterWeights, activation: str) -> str | None:
    """The reason why the Triton kernels cannot serve this adapter, or None."""
    if activation not in ACTIVATIONS:
        return f"the kernels have no activation {activation!r}"
    return _rank_obstacle(weights.down.shape[0]) or coupling.why_not_triton(x, *weights)


def check_adapter(x: torch.Tensor, weights: AdapterWeights, activation: str, dropout: float) -> int:
    """Validate one adapter; the number of its activation."""
    given = (facts(x), tuple(map(facts, weights)), activation, dropout)
    try:
        return _check_adapter(*given)
    except TypeError:  # see coupling.api.check
        return _check_adapter.__wrapped__(*given)


_Facts = tuple[torch.Size, torch.dtype, torch.device]


@remembered
def _check_adapter(x: _Facts, weights: tuple[_Facts, ...], activation: str, dropout: float) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; these are known: {', '.join(sorted(ACTIVATIONS))}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    shape, dtype, device = x
    if not shape:
        raise ValueError("x needs at least one dimension")
    if dtype not in coupling.FLOATS:
        raise TypeError(f"x must be floating point, got {dtype}")
    down = weights[0][0]
    if len(down) != 2 or not down[0]:
        raise ValueError(f"down is [rank, H] with a rank of at least 1, got {tuple(down)}")
    rank, width = down
    if width != shape[-1] or not width:
        raise ValueError(f"down is {tuple(down)}, the last dimension of x {shape[-1]}")
    expected = {"down_bias": (rank,), "up": (width, rank), "up_bias": (width,)}
    for (name, wanted), (actual, _, _) in zip(expected.items(), weights[1:], strict=True):
        if tuple(actual) != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tuple(actual)}")
    dtypes = {weight[1] for weight in weights}
    if len(dtypes) > 1 or not dtypes <= {dtype, torch.float32} or (dtype == torch.float64 != weights[0][1]):
        raise TypeError(
            f"all weights must be {dtype} like x, or float32 beside 16-bit x, got {sorted(map(str, dtypes))}"
        )
    if any(weight[2] != device for weight in weights):
        raise ValueError(f"x is on {device}, the weights on {sorted({str(weight[2]) for weight in weights})}")
    return ACTIVATIONS[activation]


def seed_of(dropout: float, seed: int | None) -> int:
    """The seed, which only dropout needs."""
    if not dropout:
        return 0
    if seed is None:
        raise ValueError("dropout needs a seed: the same one for an op, its inverse and its backward")
    return seed


def check_like(name: str, tensor: torch.Tensor | None, like: torch.Tensor, what: str) -> None:
    """Validate shape and device by those of another tensor."""
    if tensor is None:
        return
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device}, {what} {tuple(like.shape)} on {like.device}"
        )


def check_lane(
    stream: torch.Tensor,
    x: torch.Tensor,
    coefficient: float,
    center: torch.Tensor | None,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    inplace: bool,
) -> Coupling:
    """Validate one coupling step."""
    exact = coupling.check(stream, x, center, fraction_bits, coefficient, branch_name="x")
    return Coupling(coefficient, exact, center, fraction_bits, value_dtype, inplace)


def check_gradient(dy: torch.Tensor, x: torch.Tensor, dx_into: torch.Tensor | None) -> None:
    """Validate the gradient that comes in and the tensor that the one going out is added to."""
    for name, tensor in (("dy", dy), ("dx_into", dx_into)):
        check_like(name, tensor, x, "x")
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if dx_into is not None and dx_into.numel():
        taken = {id(dy): "dy", id(x): "x"}.get(id(dx_into))
        for name, tensor in (("dy", dy), ("x", x)):
            if tensor.data_ptr() == dx_into.data_ptr():
                taken = name
        if taken is not None:
            raise ValueError(f"dx_into is written, and must not be {taken}'s memory")
