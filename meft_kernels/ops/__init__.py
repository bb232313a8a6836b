"""Functional ops, each with a torch reference and a Triton implementation behind one ``impl`` argument."""

from .coupling.api import couple, reciprocal, uncouple
from .coupling.reference import dequantise, quantise
from .coupling.types import INT_LIMIT, NON_FINITE, OVERFLOW, Coupled, Uncoupled

__all__ = [
    "INT_LIMIT",
    "NON_FINITE",
    "OVERFLOW",
    "Coupled",
    "Uncoupled",
    "couple",
    "dequantise",
    "quantise",
    "reciprocal",
    "uncouple",
]
