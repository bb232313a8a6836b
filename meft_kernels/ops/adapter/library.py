"""The adapter ops as operators of ``torch.ops.meft_kernels``; see ``coupling.library``."""

from __future__ import annotations

from typing import Any

import torch

from ..coupling.library import fake_totals, fake_value, present
from ..coupling.packing import packed_shape
from . import api
from .checks import check_adapter, check_lane
from .types import AdapterWeights


@torch.library.custom_op("meft_kernels::parallel_adapter", mutates_args=())
def _parallel_adapter(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    activation: str,
    dropout: float,
    seed: int,
    impl: str,
) -> torch.Tensor:
    weights = AdapterWeights(down, down_bias, up, up_bias)
    if residual is None:
        return api.adapter_forward(x, weights, activation, dropout=dropout, seed=seed, impl=impl)  # type: ignore[arg-type]
    return api.parallel_adapter(
        x, residual, weights, activation, dropout=dropout, seed=seed, impl=impl  # type: ignore[arg-type]
    )  # fmt: skip


@torch.library.custom_op("meft_kernels::adapter_backward", mutates_args=())
def _adapter_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    activation: str,
    dropout: float,
    seed: int,
    residual: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = AdapterWeights(down, down_bias, up, up_bias)
    dx, gradients = api.adapter_backward(
        dy, x, weights, activation, dropout=dropout, seed=seed, residual=residual, impl=impl  # type: ignore[arg-type]
    )  # fmt: skip
    return dx, *gradients


@torch.library.custom_op("meft_kernels::adapter_couple", mutates_args=())
def _adapter_couple(
    a: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    center: torch.Tensor | None,
    activation: str,
    coefficient: float,
    dropout: float,
    seed: int | None,
    residual: bool,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    done = api.adapter_couple(
        a, x, AdapterWeights(down, down_bias, up, up_bias), activation, coefficient, dropout=dropout, seed=seed,
        center=center, residual=residual, fraction_bits=fraction_bits, value_dtype=value_dtype,
        impl=impl,  # type: ignore[arg-type]
    )  # fmt: skip
    return done.y, present(done.value, a), present(done.remainder, a), done.checksum.clone(), done.status.clone()


@torch.library.custom_op("meft_kernels::adapter_uncouple_backward", mutates_args=())
def _adapter_uncouple_backward(
    y: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    remainder: torch.Tensor | None,
    center: torch.Tensor | None,
    activation: str,
    coefficient: float,
    dropout: float,
    seed: int | None,
    residual: bool,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    through_center: bool,
    impl: str,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    done = api.adapter_uncouple_backward(
        y, dy, x, AdapterWeights(down, down_bias, up, up_bias), activation, coefficient, remainder, dropout=dropout,
        seed=seed, center=center, residual=residual, fraction_bits=fraction_bits, value_dtype=value_dtype,
        through_center=through_center, impl=impl,  # type: ignore[arg-type]
    )  # fmt: skip
    return done.a, present(done.value, y), done.checksum.clone(), done.dx, *done.gradients


# Shapes and dtypes alone, for the tracer; the arguments are checked here too.


@_parallel_adapter.register_fake
def _(x, residual, down, down_bias, up, up_bias, activation, dropout, seed, impl):  # type: ignore[no-untyped-def]
    check_adapter(x, AdapterWeights(down, down_bias, up, up_bias), activation, dropout)
    return x.new_empty(x.shape)


@_adapter_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, x, down, down_bias, up, up_bias, activation, dropout, seed, residual, impl
):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, down, down_bias, up, up_bias))


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, residual, *rest = inputs
    ctx.save_for_backward(x, *rest[:4])
    ctx.settings = rest[4:]
    ctx.residual = residual is not None


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    activation, dropout, seed, impl = ctx.settings
    dx, *gradients = torch.ops.meft_kernels.adapter_backward(
        dy, *ctx.saved_tensors, activation, dropout, seed, False, impl
    )
    return dx, dy if ctx.residual else None, *gradients, None, None, None, None


_parallel_adapter.register_autograd(_backward, setup_context=_set_up)


@_adapter_couple.register_fake
def _(  # type: ignore[no-untyped-def]
    a, x, down, down_bias, up, up_bias, center, activation, coefficient, dropout, seed, residual, fraction_bits,
    value_dtype, impl
):  # fmt: skip
    check_adapter(x, AdapterWeights(down, down_bias, up, up_bias), activation, dropout)
    lane = check_lane(a, x, coefficient, center, fraction_bits, value_dtype, False)
    remainder = a.new_empty(0)
    if lane.exact is not None and lane.exact[0] > 1:
        remainder = a.new_empty(packed_shape(a.shape, lane.exact[0]), dtype=torch.uint8)
    return a.new_empty(a.shape), fake_value(a, value_dtype), remainder, *fake_totals(a)


@_adapter_uncouple_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    y, dy, x, down, down_bias, up, up_bias, remainder, center, activation, coefficient, dropout, seed, residual,
    fraction_bits, value_dtype, through_center, impl
):  # fmt: skip
    check_adapter(x, AdapterWeights(down, down_bias, up, up_bias), activation, dropout)
    check_lane(y, x, coefficient, center, fraction_bits, value_dtype, False)
    gradients = (tensor.new_empty(tensor.shape) for tensor in (x, down, down_bias, up, up_bias))
    return y.new_empty(y.shape), fake_value(y, value_dtype), fake_totals(y)[0], *gradients
