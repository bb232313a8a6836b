"""Which pretrained model an adapter belongs to: noted when it is saved, held against the model when it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..engine.layer import ADAPTERS
from ..errors import AdapterFileError
from .names import plain_name
from .vocabulary import embedding_rows

logger = logging.getLogger(__name__)

SAMPLES = 16
_TOLERANCE = 2.0**-7
"""Relative; twice bfloat16's rounding, so that a base model may be loaded in another dtype than it was trained in."""
_LABELS = ("id2label", "problem_type")
"""What a classifier's config has beyond its pretrained model's."""

_RESIZE = ". Call model.resize_token_embeddings({}) first, and set rows that the folder lacks to what they were"


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
        AdapterFileError: another class, other sizes, or other weights. A few weights that differ are warned of.
    """
    trained_on = description.get("base_model_name_or_path") or "unnamed"
    for name, here in describe_base(base).items():
        saved = description.get(name)
        if name != "base_model_name_or_path" and saved != here:
            raise AdapterFileError(
                f"the adapter does not fit this model: it was trained on one ({trained_on}) whose {name} is {saved!r}, "
                f"here it is {here!r}" + (_RESIZE.format(saved) if name == "vocab_size" else "")
            )
    # Names differ between machines and say little; weights do not lie.
    _check_samples(base, description["base_fingerprint"], trained_on)
    _warn_of_other_bits(base, description.get("base_checksums") or {}, trained_on)


def _check_samples(base: Any, expected: dict[str, list[float]], trained_on: str) -> None:
    tensors = {plain_name(name): tensor for name, tensor in base.named_parameters(remove_duplicate=False)}
    tensors = {name: tensors[plain_name(name)] for name in expected if plain_name(name) in tensors}
    # Quantised on this side: nothing to compare.
    off = {name: _differing(tensor, expected[name]) for name, tensor in tensors.items() if _sampled(tensor)}
    total = SAMPLES * len(off)
    if sum(off.values()) > 0.02 * total:
        raise AdapterFileError(
            f"the adapter was trained on other base weights ({trained_on}): "
            f"{sum(off.values())} of {total} sampled weights differ from this model's"
        )
    # A few may be of weights that nothing reads (a pooler, drawn anew by every load); those of the vocabulary are read.
    rows = embedding_rows(base)
    changed = [name for name, count in off.items() if count and tensors[name].shape[0] == rows]
    if changed:
        raise AdapterFileError(
            f"the adapter was trained on another {changed[0]} ({trained_on}): its vocabulary was changed, and the rows "
            "are not in the adapter's folder. Load it into the model that it was trained on, saved as a whole "
            "(model.save_pretrained before patch), or have the rows saved with the adapter: "
            f"modules_to_save=({changed[0].rpartition('.')[0]!r},)"
        )


def _differing(tensor: torch.Tensor, samples: list[float]) -> int:
    pairs = zip(_samples(tensor), samples, strict=True)
    return sum(not abs(here - saved) <= _TOLERANCE * max(abs(here), abs(saved)) + 1e-6 for here, saved in pairs)


def _warn_of_other_bits(base: Any, expected: dict[str, Any], trained_on: str) -> None:
    """Weights that are close and not equal may be rounded otherwise, or trained further; some nothing reads."""
    tensors = {plain_name(name): tensor for name, tensor in base.state_dict(keep_vars=True).items()}
    here = checksums({name: tensors[name] for name in expected if name in tensors})
    other = [name for name, value in here.items() if value[0] == expected[name][0] and value != expected[name]]
    if other:
        logger.warning(
            "meft_kernels: the adapter was trained on a base model (%s) of which %d tensors differ from this one's, %s "
            "among them. If the model was changed before it was patched (trained further, new weights drawn for a "
            "head), load the adapter into the same, or name these parts in modules_to_save",
            trained_on,
            len(other),
            ", ".join(other[:3]),
        )


def frozen_tensors(base: Any, saved: Iterable[str]) -> dict[str, torch.Tensor]:
    """Parameters and buffers that nothing trains and the adapter's folder lacks, by plain name; a tied one once."""
    tensors = {name: t for name, t in base.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    known = {id(tensors[name]) for name in saved}
    found = {}
    for name, tensor in tensors.items():
        if id(tensor) not in known and not tensor.requires_grad and f".{ADAPTERS}." not in name:
            known.add(id(tensor))
            found[plain_name(name)] = tensor
    return found


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """A few weights of every large matrix, by name."""
    return {name: _samples(tensor) for name, tensor in tensors.items() if _sampled(tensor)}


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Dtype and a checksum of the bits of each, by name, in one pass without copies. Quantised ones are left out."""
    return {
        name: [str(tensor.dtype).removeprefix("torch."), _checksum(tensor)]
        for name, tensor in tensors.items()
        if _plain(tensor)
    }


def are_checksums(value: Any) -> bool:
    """Whether a value read from a file is what :func:`checksums` gives, or nothing, as in earlier versions' files."""
    return value is None or (
        isinstance(value, dict)
        and all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int)
            for pair in value.values()
        )
    )


def is_fingerprint(value: Any) -> bool:
    """Whether a value read from a file is what :func:`fingerprint` gives."""
    return isinstance(value, dict) and all(
        isinstance(samples, list) and len(samples) == SAMPLES and all(isinstance(sample, float) for sample in samples)
        for samples in value.values()
    )


def _plain(tensor: Any) -> bool:
    return isinstance(tensor, DTensor) or type(tensor) in (torch.Tensor, nn.Parameter)  # a quantised one is neither


def _sampled(tensor: torch.Tensor) -> bool:
    return _plain(tensor) and tensor.is_floating_point() and tensor.dim() >= 2 and tensor.numel() >= SAMPLES


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _samples(tensor: torch.Tensor) -> list[float]:
    whole = _whole(tensor)
    places = torch.linspace(0, whole.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return [float(f"{value:.5g}") for value in whole.reshape(-1)[places.to(whole.device)].float().tolist()]


def _checksum(tensor: torch.Tensor) -> int:
    """A sum over the bits, eight bytes at a time, by rows with odd weights: rows in another order are another sum."""
    whole = _whole(tensor).contiguous()
    bits = whole.reshape(-1).view(torch.uint8)
    if bits.numel() % 8:
        bits = nn.functional.pad(bits, (0, -bits.numel() % 8))
    words = (bits.clone() if bits.storage_offset() % 8 else bits).view(torch.int64)
    rows = whole.shape[0] if whole.dim() > 1 and words.numel() % whole.shape[0] == 0 else words.numel()
    sums = words.reshape(rows, -1).sum(1)  # wraps around
    return int((sums * torch.arange(1, 2 * rows, 2, device=sums.device)).sum())
