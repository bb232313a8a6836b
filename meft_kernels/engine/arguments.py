"""The arguments of a layer's call: the KV caches among them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

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


def copies_of_caches(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Copies of a call's KV caches, to be filled for a trial; what they hold may have been computed, as a prefix is."""
    memo = {id(tensor): tensor.detach().clone() for tensor in cached_tensors(kwargs)}
    return copy.deepcopy(caches_in(kwargs), memo)


def gives_gradient(values: Iterable[Any]) -> bool:
    """Whether any of them is a tensor that needs a gradient."""
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a recompute, which must not append to a KV cache."""
    caches = caches_in(kwargs)
    return {name: value for name, value in kwargs.items() if name not in caches and name != "use_cache"}
