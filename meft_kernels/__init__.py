"""Reversible fine-tuning of pretrained transformers: no activations kept, gradients exact at any depth."""

from . import ops
from .architectures import ArchitectureSpec, LayerSpec, register_architecture, supported_model_types
from .checkpoint import load_adapter, save_adapter
from .config import MeftConfig
from .describe import Description, describe, print_trainable_parameters
from .errors import (
    AdapterFileError,
    MeftError,
    NonFiniteError,
    NotRepeatableError,
    PatchError,
    ReversibleUsageError,
    StreamOverflowError,
    UnsupportedModelError,
)
from .patching import disable_adapter, patch, unpatch
from .verify import VerifyReport, calibrate, verify

__all__ = [
    "AdapterFileError",
    "ArchitectureSpec",
    "Description",
    "LayerSpec",
    "MeftConfig",
    "MeftError",
    "NonFiniteError",
    "NotRepeatableError",
    "PatchError",
    "ReversibleUsageError",
    "StreamOverflowError",
    "UnsupportedModelError",
    "VerifyReport",
    "calibrate",
    "describe",
    "disable_adapter",
    "load_adapter",
    "ops",
    "patch",
    "print_trainable_parameters",
    "register_architecture",
    "save_adapter",
    "supported_model_types",
    "unpatch",
    "verify",
]
