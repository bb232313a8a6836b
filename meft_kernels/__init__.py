"""Reversible fine-tuning of pretrained transformers: no activations kept, gradients exact at any depth."""

from typing import TYPE_CHECKING, Any

from . import ops
from .architectures import ArchitectureSpec, LayerSpec, register_architecture, supported_model_types
from .checkpoint.auto import (
    AutoMeftModel,
    AutoMeftModelForCausalLM,
    AutoMeftModelForQuestionAnswering,
    AutoMeftModelForSeq2SeqLM,
    AutoMeftModelForSequenceClassification,
    AutoMeftModelForTokenClassification,
)
from .checkpoint.load import load_adapter
from .checkpoint.save import save_adapter
from .config import MeftConfig
from .errors import (
    AdapterFileError,
    BudgetError,
    MeftError,
    NonFiniteError,
    NotRepeatableError,
    PatchError,
    ReversibleUsageError,
    StreamOverflowError,
    UnsupportedModelError,
)
from .patching.patch import patch, unpatch
from .patching.reference import ReferenceModel, reference_model
from .patching.reversible import reversible
from .patching.switching import adapter_names, add_adapter, delete_adapter, disable_adapter, set_adapter
from .reports.describe import Description, describe, print_trainable_parameters
from .reports.verify import VerifyReport, calibrate, verify

if TYPE_CHECKING:
    from .planning import Plan, plan
    from .reports.callback import MeftCallback

__all__ = [
    "AdapterFileError",
    "ArchitectureSpec",
    "AutoMeftModel",
    "AutoMeftModelForCausalLM",
    "AutoMeftModelForQuestionAnswering",
    "AutoMeftModelForSeq2SeqLM",
    "AutoMeftModelForSequenceClassification",
    "AutoMeftModelForTokenClassification",
    "BudgetError",
    "Description",
    "LayerSpec",
    "MeftCallback",
    "MeftConfig",
    "MeftError",
    "NonFiniteError",
    "NotRepeatableError",
    "PatchError",
    "Plan",
    "ReferenceModel",
    "ReversibleUsageError",
    "StreamOverflowError",
    "UnsupportedModelError",
    "VerifyReport",
    "adapter_names",
    "add_adapter",
    "calibrate",
    "delete_adapter",
    "describe",
    "disable_adapter",
    "load_adapter",
    "ops",
    "patch",
    "plan",
    "print_trainable_parameters",
    "reference_model",
    "register_architecture",
    "reversible",
    "save_adapter",
    "set_adapter",
    "supported_model_types",
    "unpatch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "MeftCallback":  # with it comes transformers' Trainer, which takes a second to import
        from .reports.callback import MeftCallback

        return MeftCallback
    if name in ("Plan", "plan"):  # with it comes the estimator
        from . import planning

        return getattr(planning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
