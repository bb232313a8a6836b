"""``config.model_type`` -> :class:`ArchitectureSpec`."""

from __future__ import annotations

from .spec import ArchitectureSpec

_SPECS: dict[str, ArchitectureSpec] = {}


def register_architecture(spec: ArchitectureSpec) -> ArchitectureSpec:
    """Make a family known to :func:`meft_kernels.patch`; a later registration of a model type replaces the former."""
    for model_type in spec.model_types:
        _SPECS[model_type] = spec
    return spec


def find_architecture(model_type: str) -> ArchitectureSpec | None:
    """The spec that serves ``model_type``, or None."""
    return _SPECS.get(model_type)


def supported_model_types() -> list[str]:
    """Every ``config.model_type`` that :func:`meft_kernels.patch` takes, sorted."""
    return sorted(_SPECS)
