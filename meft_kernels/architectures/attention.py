"""A family's attention block in pieces, and what the families' pieces share.

transformers' attention modules all do the same: project, rotate, hand queries, keys and values to the attention
function that the config names, project again. Here that function is called as they call it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def _always(layer: Any, kwargs: dict[str, Any]) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class AttentionPieces:
    """An attention block as three functions, of which the first and the last compute every token for itself.

    ``output(layer, x, attend(layer, *project(layer, x)))`` is the attention block bit for bit. ``kwargs`` are the layer
    call's own, by name, without a KV cache.
    """

    project: Callable[..., Any]
    """``(layer, hidden_states, **kwargs) -> (queries, keys, values)``, each ``[batch, heads, tokens, D]``, from the
    layer's input, its norm and rotary embeddings included."""

    attend: Callable[..., torch.Tensor]
    """``(layer, queries, keys, values, **kwargs) -> [batch, tokens, heads, D]``, of any heads that belong together."""

    output: Callable[..., torch.Tensor]
    """``(layer, hidden_states, attended, **kwargs) -> hidden_states`` after the block, its residual included."""

    replaces: Callable[[Any], tuple[nn.Module, ...]]
    """``layer -> modules`` that are not called as such then: nobody may listen to them or have replaced them."""

    by_position: tuple[str, ...] = ()
    """Arguments, tensors or tuples of them, ``[batch or 1, tokens, ...]``, of which a tile needs its own part."""

    applies: Callable[[Any, dict[str, Any]], bool] = _always
    """``(layer, kwargs) -> bool``: whether the block does only this in such a call."""


def _modeling(attention: Any) -> Any:
    """The module of transformers that defines the attention's class, or the base of one that others derived from it."""
    for cls in type(attention).__mro__:
        module = sys.modules[cls.__module__]
        if hasattr(module, "eager_attention_forward"):
            return module
    raise TypeError(f"{type(attention).__name__} is no attention of transformers")


def split_heads(projected: torch.Tensor, size: int) -> torch.Tensor:
    """``[batch, tokens, heads * size]`` to ``[batch, heads, tokens, size]``."""
    return projected.view(*projected.shape[:-1], -1, size).transpose(1, 2)


def merge_heads(attended: torch.Tensor) -> torch.Tensor:
    """``[batch, tokens, heads, size]`` to ``[batch, tokens, heads * size]``."""
    return attended.reshape(*attended.shape[:-2], -1).contiguous()


def rotated(attention: Any, queries: torch.Tensor, keys: torch.Tensor, position_embeddings: Any) -> Any:
    """Queries and keys with the family's rotary embeddings."""
    return _modeling(attention).apply_rotary_pos_emb(queries, keys, *position_embeddings)


def attend(
    attention: Any,
    heads: tuple[torch.Tensor, ...],
    *,
    dropout: float,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The attention function that the model's config names, ``[batch, tokens, heads, D]``."""
    eager = _modeling(attention).eager_attention_forward
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    dropout = dropout if attention.training else 0.0
    attended: torch.Tensor = function(attention, *heads, attention_mask, dropout=dropout, **kwargs)[0]
    return attended
