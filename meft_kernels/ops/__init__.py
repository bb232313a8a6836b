"""Functional ops, each with a torch reference and a Triton implementation behind one ``impl`` argument."""

from ..fixed_point import reciprocal
from .adapter import library as _adapter_library  # noqa: F401  registers torch.ops.meft_kernels
from .adapter.api import (
    adapter_backward,
    adapter_couple,
    adapter_forward,
    adapter_uncouple,
    adapter_uncouple_backward,
    parallel_adapter,
)
from .adapter.checks import why_not_fused
from .adapter.types import ACTIVATIONS, AdapterWeights, UncoupledBackward
from .coupling import library as _library  # noqa: F401  registers torch.ops.meft_kernels
from .coupling.api import couple, uncouple
from .coupling.checksum import checksum
from .coupling.reference import dequantise, quantise
from .coupling.types import INT_LIMIT, NON_FINITE, OVERFLOW, Coupled, Uncoupled

__all__ = [
    "ACTIVATIONS",
    "INT_LIMIT",
    "NON_FINITE",
    "OVERFLOW",
    "AdapterWeights",
    "Coupled",
    "Uncoupled",
    "UncoupledBackward",
    "adapter_backward",
    "adapter_couple",
    "adapter_forward",
    "adapter_uncouple",
    "adapter_uncouple_backward",
    "checksum",
    "couple",
    "dequantise",
    "parallel_adapter",
    "quantise",
    "reciprocal",
    "uncouple",
    "why_not_fused",
]
