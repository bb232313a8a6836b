"""One small file per family of models; importing this package registers them all."""

import importlib
import pkgutil

from .attention import AttentionPieces
from .registry import find_architecture, register_architecture, supported_model_types
from .spec import ArchitectureSpec, LayerSpec

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ArchitectureSpec",
    "AttentionPieces",
    "LayerSpec",
    "find_architecture",
    "register_architecture",
    "supported_model_types",
]
