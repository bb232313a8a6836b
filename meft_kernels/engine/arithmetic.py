"""Exact and float streams behind one interface.

A stream is a tensor of the hidden states' shape. The engine never asks which arithmetic it has: ``enter`` makes a
stream from hidden states, ``value`` gives hidden states back, ``couple`` and ``uncouple`` move one lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ..fixed_point import Impl
from ..ops import Coupled, Uncoupled, UncoupledBackward
from .adapters import FusedBranch


@dataclass(frozen=True)
class Arithmetic:
    """How streams are held and moved.

    With ``fraction_bits`` streams are int32 fixed point and rebuilt bit for bit at any depth. Without, they are
    floating point in the hidden states' own dtype: the paper's arithmetic, whose inverse amplifies rounding by 1/lambda
    a layer.
    """

    fraction_bits: int | None
    impl: Impl = "auto"
    fuses: ClassVar[bool] = True
    """Whether ``couple_adapter`` may take the place of ``couple``."""

    def enter(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A fresh dense stream equal to the hidden states, and its status (see :class:`~meft_kernels.ops.Coupled`)."""
        hidden_states = hidden_states.detach()
        if self.fraction_bits is not None:
            return ops.quantise(hidden_states.contiguous(), self.fraction_bits)
        stream = hidden_states.clone(memory_format=torch.contiguous_format)
        return stream, (~torch.isfinite(stream)).any().to(torch.int32) * ops.NON_FINITE

    def value(self, stream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The stream as fresh hidden states of ``dtype``."""
        if self.fraction_bits is not None:
            return ops.dequantise(stream, self.fraction_bits, dtype)
        return stream.to(dtype, copy=True)

    def checksum(self, stream: torch.Tensor) -> torch.Tensor:
        """int64 scalar that the rebuilt stream must reproduce; 0 for float streams, which only come close."""
        if self.fraction_bits is not None:
            return ops.checksum(stream)
        return torch.zeros((), dtype=torch.int64, device=stream.device)

    def couple(
        self,
        a: torch.Tensor,
        branch: torch.Tensor,
        coefficient: float,
        center: torch.Tensor | None,
        value_dtype: torch.dtype | None,
        inplace: bool,
        first_row: int = 0,
    ) -> Coupled:
        """One lane forward; see :func:`meft_kernels.ops.couple`."""
        return ops.couple(
            a,
            branch,
            coefficient,
            center=center,
            fraction_bits=self.fraction_bits,
            value_dtype=value_dtype,
            inplace=inplace,
            first_row=first_row,
            impl=self.impl,
        )

    def uncouple(
        self,
        y: torch.Tensor,
        branch: torch.Tensor,
        coefficient: float,
        remainder: torch.Tensor | None,
        center: torch.Tensor | None,
        value_dtype: torch.dtype | None,
        first_row: int = 0,
    ) -> Uncoupled:
        """One lane back, in place; see :func:`meft_kernels.ops.uncouple`."""
        return ops.uncouple(
            y,
            branch,
            coefficient,
            remainder,
            center=center,
            fraction_bits=self.fraction_bits,
            value_dtype=value_dtype,
            inplace=True,
            first_row=first_row,
            impl=self.impl,
        )

    def couple_adapter(
        self,
        a: torch.Tensor,
        branch: FusedBranch,
        coefficient: float,
        center: torch.Tensor | None,
        value_dtype: torch.dtype | None,
    ) -> Coupled:
        """``couple`` in place, with a branch that never touches memory; see :func:`meft_kernels.ops.adapter_couple`."""
        return ops.adapter_couple(
            a,
            branch.x,
            branch.weights,
            branch.activation,
            coefficient,
            dropout=branch.dropout,
            seed=branch.seed,
            center=center,
            residual=branch.residual,
            fraction_bits=self.fraction_bits,
            value_dtype=value_dtype,
            inplace=True,
            impl=self.impl,
        )

    def uncouple_adapter(
        self,
        y: torch.Tensor,
        dy: torch.Tensor,
        branch: FusedBranch,
        coefficient: float,
        remainder: torch.Tensor | None,
        center: torch.Tensor | None,
        value_dtype: torch.dtype | None,
        dx_into: torch.Tensor,
    ) -> UncoupledBackward:
        """Inverse of :meth:`couple_adapter`, in place, and the gradients of the branch.

        What comes through the branch is added to ``dx_into``, the gradient of its input.
        """
        return ops.adapter_uncouple_backward(
            y,
            dy,
            branch.x,
            branch.weights,
            branch.activation,
            coefficient,
            remainder,
            dropout=branch.dropout,
            seed=branch.seed,
            center=center,
            residual=branch.residual,
            fraction_bits=self.fraction_bits,
            value_dtype=value_dtype,
            inplace=True,
            dx_into=dx_into,
            impl=self.impl,
        )
