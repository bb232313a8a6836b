"""Which pretrained model an adapter belongs to: noted when it is saved, held against the model when it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import AdapterFileError

SAMPLES = 16
_TOLERANCE = 2.0**-7
"""Relative; twice bfloat16's rounding, so that a base model may be loaded in another dtype than it was trained in."""
_LABELS = ("id2label", "problem_type")
"""What a classifier's config has beyond its pretrained model's."""


def describe_base(base: Any) -> dict[str, Any]:
    """Name, class and sizes of the model."""
    config = base.config
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")  # not every family has each of them
    return {
        "base_model_name_or_path": getattr(config, "_name_or_path", "") or "",
        "base_model_class": type(base).__name__,
        "model_type": config.model_type,
        **{name: getattr(config, name, None) for name in sizes},
    }


def describe_labels(base: Any) -> dict[str, Any] | None:
    """The names of a classifier's classes, None for other models."""
    if "For" not in type(base).__name__ or "Classification" not in type(base).__name__:
        return None
    found = {name: getattr(base.config, name, None) for name in _LABELS}
    # JSON has no integers for keys.
    return {**found, "id2label": {str(index): str(label) for index, label in (found["id2label"] or {}).items()}}


def check_base(base: Any, description: dict[str, Any]) -> None:
    """Refuse a model that the adapter was not trained on.

    Raises:
        AdapterFileError: another class, other sizes, or other weights.
    """
    trained_on = description.get("base_model_name_or_path") or "unnamed"
    for name, here in describe_base(base).items():
        saved = description.get(name)
        if name != "base_model_name_or_path" and saved != here:
            raise AdapterFileError(
                f"the adapter does not fit this model: it was trained on one ({trained_on}) whose {name} is {saved!r}, "
                f"here it is {here!r}"
            )
    # Names differ between machines and say little; weights do not lie.
    expected = description["base_fingerprint"]
    tensors = dict(base.named_parameters())
    off = total = 0
    for name, values in expected.items():
        tensor = tensors.get(name)
        if tensor is None or not _sampled(tensor):
            continue  # quantised on this side: nothing to compare
        for here, saved in zip(_samples(tensor), values, strict=True):
            total += 1
            off += not abs(here - saved) <= _TOLERANCE * max(abs(here), abs(saved)) + 1e-6
    if off > 0.02 * total:
        raise AdapterFileError(
            f"the adapter was trained on other base weights ({trained_on}): "
            f"{off} of {total} sampled weights differ from this model's"
        )


def fingerprint(base: Any, trained: Iterable[str]) -> dict[str, list[float]]:
    """A few weights of every large frozen matrix."""
    skip = set(trained)
    return {
        name: _samples(parameter)
        for name, parameter in base.named_parameters()
        if name not in skip and not parameter.requires_grad and _sampled(parameter)
    }


def is_fingerprint(value: Any) -> bool:
    """Whether a value read from a file is what :func:`fingerprint` gives."""
    return isinstance(value, dict) and all(
        isinstance(samples, list) and len(samples) == SAMPLES and all(isinstance(sample, float) for sample in samples)
        for samples in value.values()
    )


def _sampled(tensor: torch.Tensor) -> bool:
    plain = isinstance(tensor, DTensor) or type(tensor) in (torch.Tensor, nn.Parameter)  # a quantised one is neither
    return plain and tensor.is_floating_point() and tensor.dim() >= 2 and tensor.numel() >= SAMPLES


def _samples(tensor: torch.Tensor) -> list[float]:
    whole = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
    places = torch.linspace(0, whole.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return [float(f"{value:.5g}") for value in whole.reshape(-1)[places.to(whole.device)].float().tolist()]
