"""Where a layer's FFN reads and writes, seen in a call of it, and where the layer ends in a norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .trace import Call

_FFN_NAMES = (
    "mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "feedforward", "feed_forward_layer", "mlp_block",
    "ffn_layer", "sparse_moe", "moe_layer", "mixture_of_experts", "shared_mlp", "MLP", "fc",
)  # fmt: skip
_ATTENTION = ("attn", "attention")


class Tap(NamedTuple):
    """Paths in a layer: of the module whose input the FFN reads, and of that whose output it writes."""

    reads: str
    writes: str


def find_tap(parts: list[Call], width: int) -> Tap | None:
    """The FFN of a layer: by its name, else the last part that keeps the width, else the last pair of linear layers.

    Args:
        parts: the calls of a layer's modules in one call of it, in time.
        width: of the hidden states.
    """
    once = [part for part in parts if sum(other.name == part.name for other in parts) == 1 and part.given is not None]
    direct = {part.name: part for part in once if "." not in part.name}
    for name in _FFN_NAMES:
        if name in direct and _keeps(direct[name], width):
            return _before_dropout(direct[name], parts)
    pair = _pair(sorted(once, key=lambda part: part.start), width)
    last = _last_that_keeps(list(direct.values()), width)
    if last is not None and (pair is None or last.end >= pair[1].end):
        return _before_dropout(last, parts)
    return None if pair is None else Tap(pair[0].name, pair[1].name)


def leading_to(layer: Call, parts: list[Call]) -> list[Call]:
    """The parts on the way to a layer's hidden states. Others make what it returns beside them (LiLT's layout)."""
    if layer.returned is None or sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(layer.output)) < 2:
        return parts
    seen, todo = set(), [layer.returned.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [below for below, _ in node.next_functions]
    if not seen:
        return parts
    return [part for part in parts if part.returned is not None and part.returned.grad_fn in seen]


def _before_dropout(ffn: Call, parts: list[Call]) -> Tap:
    """An FFN that ends in dropout is tapped before that: what the adapter adds is dropped with what the FFN gives.

    So it is where dropout comes after the FFN. In chunks, each chunk is tapped.
    """
    inside = sorted((part for part in parts if part.name.startswith(f"{ffn.name}.")), key=lambda part: part.start)
    last = next((part for part in reversed(inside) if isinstance(part.module, nn.Dropout)), None)
    linear = [part for part in inside if _is_linear(part.module)]
    if last is None or not linear or last.start < linear[-1].end or last.given is not linear[-1].returned:
        return Tap(ffn.name, ffn.name)
    in_chunks = sum(part.name == linear[-1].name for part in linear) > 1
    return Tap(linear[0].name if in_chunks else ffn.name, linear[-1].name)


def _keeps(part: Call, width: int) -> bool:
    given, returned = part.given, part.returned
    if given is None or returned is None or not returned.is_floating_point():
        return False
    return given.shape == returned.shape and given.shape[-1] == width


def _last_that_keeps(direct: list[Call], width: int) -> Call | None:
    keeping = [
        part
        for part in direct
        if _keeps(part, width)
        and not is_norm(part.module)
        and not _is_linear(part.module)
        and not _is_attention(part.name)
        and next(part.module.parameters(), None) is not None
    ]
    return max(keeping, key=lambda part: part.end, default=None)


def _pair(parts: list[Call], width: int) -> tuple[Call, Call] | None:
    """The last linear layer that gives the width, outside of attention, and the last before it that reads the same.

    One that gives another width, if there is such: an FFN is rarely as wide within as the hidden states are.
    """
    linear = [part for part in parts if _is_linear(part.module) and not _is_attention(part.name)]
    linear = [part for part in linear if not any(part.name.startswith(f"{other.name}.") for other in linear)]
    writes = next((p for p in reversed(linear) if p.returned is not None and p.returned.shape[-1] == width), None)
    if writes is None or writes.returned is None:
        return None
    before = [part for part in reversed(linear) if part.start < writes.start and part.given is not None]
    before = [part for part in before if part.given.shape == writes.returned.shape]  # type: ignore[union-attr]
    other = (part for part in before if part.returned is not None and part.returned.shape[-1] != width)
    reads = next(other, before[0] if before else None)
    return None if reads is None else (reads, writes)


def _is_linear(module: nn.Module) -> bool:
    """Also one that is quantised, or that a LoRA wraps."""
    inner = getattr(module, "base_layer", module)
    return (hasattr(inner, "in_features") and hasattr(inner, "out_features")) or type(inner).__name__ == "Conv1D"


def _is_attention(name: str) -> bool:
    return any(hint in name.lower() for hint in _ATTENTION)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm, or what does nothing in evaluation."""
    name = type(module).__name__.lower()
    return "norm" in name or "droppath" in name or isinstance(module, nn.Dropout | nn.Identity)


def ends_in_norm(layer: Call, parts: list[Call]) -> bool:
    """Whether what a layer returns is what a norm in it gave, so that no residual stream goes through it."""
    norms = [p for p in parts if p.returned is not None and "norm" in type(p.module).__name__.lower()]
    last = max(norms, key=lambda part: part.end, default=None)
    if last is None or last.returned is None or layer.returned is None:
        return False
    later = any(p.start > last.end and next(p.module.parameters(recurse=False), None) is not None for p in parts)
    return not later and last.returned.shape == layer.returned.shape and torch.equal(last.returned, layer.returned)
