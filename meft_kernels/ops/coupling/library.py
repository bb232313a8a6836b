"""The coupling ops as operators of ``torch.ops.meft_kernels``, which ``torch.compile(fullgraph=True)`` can trace.

``torch.compile`` sees one opaque node an op, with the shapes of its outputs, so what runs inside is what runs eagerly:
the same bits. An operator cannot return None; an empty tensor stands for what was not asked for.
"""

from __future__ import annotations

import torch

from . import api
from .packing import packed_shape


def present(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The tensor, or an empty one where there is none."""
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("meft_kernels::couple", mutates_args=())
def _couple(
    a: torch.Tensor,
    branch: torch.Tensor,
    center: torch.Tensor | None,
    coefficient: float,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    first_row: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    done = api.couple_now(a, branch, coefficient, center, fraction_bits, value_dtype, False, first_row, impl)
    return done.y, present(done.value, a), present(done.remainder, a), done.checksum, done.status


@torch.library.custom_op("meft_kernels::couple_", mutates_args=("a",))
def _couple_inplace(
    a: torch.Tensor,
    branch: torch.Tensor,
    center: torch.Tensor | None,
    coefficient: float,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    first_row: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    done = api.couple_now(a, branch, coefficient, center, fraction_bits, value_dtype, True, first_row, impl)
    return present(done.value, a), present(done.remainder, a), done.checksum, done.status


@torch.library.custom_op("meft_kernels::uncouple", mutates_args=())
def _uncouple(
    y: torch.Tensor,
    branch: torch.Tensor,
    remainder: torch.Tensor | None,
    center: torch.Tensor | None,
    coefficient: float,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    first_row: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    undone = api.uncouple_now(
        y, branch, coefficient, remainder, center, fraction_bits, value_dtype, False, first_row, impl
    )
    return undone.a, present(undone.value, y), undone.checksum


@torch.library.custom_op("meft_kernels::uncouple_", mutates_args=("y",))
def _uncouple_inplace(
    y: torch.Tensor,
    branch: torch.Tensor,
    remainder: torch.Tensor | None,
    center: torch.Tensor | None,
    coefficient: float,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
    first_row: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    undone = api.uncouple_now(
        y, branch, coefficient, remainder, center, fraction_bits, value_dtype, True, first_row, impl
    )
    return present(undone.value, y), undone.checksum


# Shapes and dtypes alone, for the tracer. The arguments are checked here too: a mistake shows when the graph is made.


def fake_value(stream: torch.Tensor, value_dtype: torch.dtype | None) -> torch.Tensor:
    """The value copy of a stream, or the empty tensor in its place."""
    if value_dtype is None:
        return stream.new_empty(0)
    return stream.new_empty(stream.shape, dtype=value_dtype)


def fake_totals(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checksum and status."""
    return stream.new_empty((), dtype=torch.int64), stream.new_empty((), dtype=torch.int32)


def _fake_couple(
    a: torch.Tensor,
    branch: torch.Tensor,
    center: torch.Tensor | None,
    coefficient: float,
    fraction_bits: int | None,
    value_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    exact = api.check(a, branch, center, fraction_bits, coefficient)
    remainder = a.new_empty(0)
    if exact is not None and exact[0] > 1:
        remainder = a.new_empty(packed_shape(a.shape, exact[0]), dtype=torch.uint8)
    return fake_value(a, value_dtype), remainder, *fake_totals(a)


@_couple_inplace.register_fake
def _(a, branch, center, coefficient, fraction_bits, value_dtype, first_row, impl):  # type: ignore[no-untyped-def]
    return _fake_couple(a, branch, center, coefficient, fraction_bits, value_dtype)


@_couple.register_fake
def _(a, branch, center, coefficient, fraction_bits, value_dtype, first_row, impl):  # type: ignore[no-untyped-def]
    return a.new_empty(a.shape), *_fake_couple(a, branch, center, coefficient, fraction_bits, value_dtype)


@_uncouple_inplace.register_fake
def _(  # type: ignore[no-untyped-def]
    y, branch, remainder, center, coefficient, fraction_bits, value_dtype, first_row, impl
) -> tuple[torch.Tensor, torch.Tensor]:
    api.check(y, branch, center, fraction_bits, coefficient)
    return fake_value(y, value_dtype), y.new_empty((), dtype=torch.int64)


@_uncouple.register_fake
def _(y, branch, remainder, center, coefficient, fraction_bits, value_dtype, first_row, impl):  # type: ignore[no-untyped-def]
    api.check(y, branch, center, fraction_bits, coefficient)
    return y.new_empty(y.shape), fake_value(y, value_dtype), y.new_empty((), dtype=torch.int64)
