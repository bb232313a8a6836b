"""What the adapter ops take and return, and the activations that they know."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_RANK = 256
"""Largest rank of the Triton kernels: a whole row of the bottleneck stays in registers."""

GELU, GELU_TANH, RELU, SILU = range(4)

ACTIVATIONS = {
    "gelu": GELU,
    "gelu_python": GELU,
    "gelu_tanh": GELU_TANH,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_accurate": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_python_tanh": GELU_TANH,
    "relu": RELU,
    "silu": SILU,
    "swish": SILU,
}
"""transformers' names (``ACT2FN``) to what is computed."""


class AdapterWeights(NamedTuple):
    """Weights of one adapter of width H and rank r, or their gradients.

    One dtype for all four: that of the hidden states, or float32 beside 16-bit ones (cast at use).
    """

    down: torch.Tensor
    """[r, H]"""
    down_bias: torch.Tensor
    """[r]"""
    up: torch.Tensor
    """[H, r]"""
    up_bias: torch.Tensor
    """[H]"""


class Coupling(NamedTuple):
    """Arguments of a coupling step, checked; see ``meft_kernels.ops.couple``."""

    coefficient: float
    exact: tuple[int, int] | None
    """(q, sign) of int32 streams."""
    center: torch.Tensor | None
    fraction_bits: int | None
    value_dtype: torch.dtype | None
    inplace: bool


class UncoupledBackward(NamedTuple):
    """Result of :func:`~meft_kernels.ops.adapter.api.adapter_uncouple_backward`."""

    a: torch.Tensor
    """The rebuilt stream, in the dtype and shape of ``y``."""
    value: torch.Tensor | None
    """``a`` as ``value_dtype``; None if no ``value_dtype`` was asked for."""
    checksum: torch.Tensor
    """Of ``a``, int64 scalar; 0 for float streams."""
    dx: torch.Tensor
    """Gradient of ``x``: ``dx_into`` where that was given, else a new tensor in the dtype of ``x``."""
    gradients: AdapterWeights
    """Gradients of the weights, in the weights' dtype."""
