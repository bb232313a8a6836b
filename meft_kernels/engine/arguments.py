"""The arguments of a layer's call: the KV caches among them, and what of them needs a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.cache_utils import Cache

from ..modules import parameters_of
from .replay import no_leaf

_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names under which a layer is handed a KV cache; transformers 5.24 took a new one."""


def caches_in(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The KV caches among a call's arguments: by their type, and by name where they are tuples of tensors."""
    return {
        name: value
        for name, value in kwargs.items()
        if value is not None and (name in _CACHE_NAMES or isinstance(value, Cache))
    }


def cached_tensors(kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Keys and values in a call's KV caches: prefix tuning puts tensors there that are to be trained."""
    for cache in caches_in(kwargs).values():
        parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
        for part in [part for part in parts if part is not None] or [cache]:
            layers = getattr(part, "layers", part)
            held = [vars(layer) if hasattr(layer, "__dict__") else layer for layer in layers]
            yield from (leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor))


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a recompute, which must not append to a KV cache."""
    caches = caches_in(kwargs)
    return {name: value for name, value in kwargs.items() if name not in caches and name != "use_cache"}


def differentiable(
    module: nn.Module, kwargs: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, Any]]:
    """What of a layer call needs a gradient besides the streams.

    Returns:
        The tensors themselves; the leaves to differentiate by (parameters stand for themselves, arguments for detached
        copies); and ``kwargs`` with those copies in place.
    """
    tensors: list[torch.Tensor] = [parameter for parameter in parameters_of(module) if parameter.requires_grad]
    leaves = list(tensors)

    def detach(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        leaf = tensor.detach().requires_grad_()
        tensors.append(tensor)
        leaves.append(leaf)
        return no_leaf(leaf)

    return tensors, leaves, tree_map_only(torch.Tensor, detach, kwargs)
