"""Reversible fine-tuning of pretrained transformers: no activations kept, gradients exact at any depth."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from .planning import Plan, plan
    from .reports.callback import MeftCallback
    from .reports.describe import Description, describe, print_trainable_parameters
    from .reports.verify import VerifyReport, calibrate, verify

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


# By the module that has it. torch takes seconds to import and transformers' Trainer more, and a command that only reads
# its options needs neither: each name is imported when it is first asked for.
_PLACES = {
    "architectures": ("ArchitectureSpec", "LayerSpec", "register_architecture", "supported_model_types"),
    "checkpoint.auto": (
        "AutoMeftModel",
        "AutoMeftModelForCausalLM",
        "AutoMeftModelForQuestionAnswering",
        "AutoMeftModelForSeq2SeqLM",
        "AutoMeftModelForSequenceClassification",
        "AutoMeftModelForTokenClassification",
    ),
    "checkpoint.load": ("load_adapter",),
    "checkpoint.save": ("save_adapter",),
    "config": ("MeftConfig",),
    "errors": (
        "AdapterFileError",
        "BudgetError",
        "MeftError",
        "NonFiniteError",
        "NotRepeatableError",
        "PatchError",
        "ReversibleUsageError",
        "StreamOverflowError",
        "UnsupportedModelError",
    ),
    "patching.patch": ("patch", "unpatch"),
    "patching.reference": ("ReferenceModel", "reference_model"),
    "patching.reversible": ("reversible",),
    "patching.switching": ("adapter_names", "add_adapter", "delete_adapter", "disable_adapter", "set_adapter"),
    "planning": ("Plan", "plan"),
    "reports.callback": ("MeftCallback",),
    "reports.describe": ("Description", "describe", "print_trainable_parameters"),
    "reports.verify": ("VerifyReport", "calibrate", "verify"),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PLACE_OF[name]}", __name__), name)
    globals()[name] = value  # found without this function the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
