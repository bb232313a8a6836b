"""Layers of a list that are alike in all that can be seen of them: what is proven of one holds for all of a kind."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from .trace import Call, Trace


class Unproven(Exception):
    """What was found does not hold; says what, and where."""


def kinds_of(calls: list[Call], seen: Trace) -> list[list[Call]]:
    """The calls of a list's layers, those that are alike together.

    Alike are layers of the same modules with the same settings, which were handed the same sort of arguments, called
    their parts in the same order on the same shapes, and made the same graph of it. What tells them apart is their
    weights, their place, and the values that went through them.

    Args:
        calls: one a layer, in time.
        seen: the forward that they are from.

    Raises:
        Unproven: one of them reads what another layer computed, and was not handed it.
    """
    entered = {node: call for call in seen.layers for node in _nodes([call.entered])}
    settings = [_settings(call.module) for call in calls]
    numbers = _numbers(settings)
    found: dict[Any, list[Call]] = {}
    for call, of_layer in zip(calls, settings, strict=True):
        same = frozenset((name, value) for name, value in of_layer.items() if name not in numbers)
        kind = same, _arguments(call), _parts(call, seen), _graph(call, entered)
        found.setdefault(kind, []).append(call)
    return list(found.values())


def outputs_of(output: Any) -> list[torch.Tensor]:
    """What of a layer's output gradients come back through."""
    return [leaf for leaf in tree_leaves(output) if _needs_gradient(leaf)]


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _nodes(values: Any) -> list[Node]:
    """What computed the tensors among these that need a gradient."""
    return [leaf.grad_fn for leaf in tree_leaves(values) if _needs_gradient(leaf) and leaf.grad_fn is not None]


Settings = dict[tuple[str, str], Any]
"""By a module's path in its layer and the name of what is set on it."""


def _settings(layer: nn.Module) -> Settings:
    """What the modules of a layer are, and all that is set on them."""
    found: Settings = {}
    for path, part in layer.named_modules():
        found[path, ""] = type(part), len(part._forward_hooks), len(part._forward_pre_hooks)
        found |= {(path, name): _setting(value) for name, value in vars(part).items() if not name.startswith("_")}
    return found


def _setting(value: Any) -> Any:
    """A value by which a layer may decide what it does."""
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value != 0
    if isinstance(value, tuple | list):
        return tuple(map(_setting, value))
    return type(value)


def _numbers(settings: list[Settings]) -> set[tuple[str, str]]:
    """What only numbers the layers: it grows by one from each to the next."""
    values: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, of_layer in enumerate(settings):
        for name, value in of_layer.items():
            if type(value) is int:
                values[name].append(value - place)
    return {name for name, found in values.items() if len(found) > 1 and len(set(found)) == 1}


def _arguments(call: Call) -> Any:
    return tuple(map(_argument, call.args)), tuple((name, _argument(value)) for name, value in call.kwargs.items())


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_argument, value))
    if isinstance(value, dict):
        return tuple((name, _argument(each)) for name, each in value.items())
    return type(value)


def _parts(call: Call, seen: Trace) -> Any:
    parts = (part for part in seen.parts[id(call.module)] if call.contains(part))
    return tuple(
        (part.name, getattr(part.given, "shape", None), getattr(part.returned, "shape", None)) for part in parts
    )


def _graph(call: Call, entered: dict[Node, Call]) -> tuple[str, ...]:
    """Names of the graph's nodes from what a layer gives down to what it was handed.

    Args:
        call: the layer's.
        entered: the nodes by which hidden states went into layers, and into which.

    Raises:
        Unproven: it leads into another layer.
    """
    handed = [*call.args, *call.kwargs.values(), *call.held.values()]
    ends = {node for value in handed for node in _nodes(_content(value))}
    todo = _nodes([call.output, call.written])
    names: list[str] = []
    known: set[Node] = set()
    while todo:
        node = todo.pop()
        if node in known:
            continue
        known.add(node)
        other = entered.get(node)
        if other is call or node in ends:
            names.append("")
            continue
        if other is not None and not call.contains(other):
            raise Unproven(
                f"gradients go another way through {call.name} than from what it returns to what it is given: it reads "
                f"what {other.name} computed, and is not handed it (keys and values shared across layers, say)"
            )
        names.append(node.name())
        todo += [below for below, _ in node.next_functions if below is not None]
    return tuple(names)


def _content(value: Any) -> Any:
    """Mappings that are no pytrees may be handed on, too."""
    return dict(value) if hasattr(value, "keys") and hasattr(value, "__getitem__") else value
