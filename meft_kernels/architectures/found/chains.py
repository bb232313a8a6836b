"""Which lists of a model's layers are a stack: each called once a pass, in order, on what the one before returned."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from .trace import Call, Trace, is_same


@dataclass
class Chain:
    """A list of layers through which hidden states go, from call to call untouched but for a few places."""

    name: str
    layers: list[nn.Module]
    calls: list[Call]
    """Of the first pass through it."""
    order: tuple[int, ...]
    """Indices of the layers called: each once and in turn, or (shared layers) several times, each on what the call
    before returned."""
    begins: tuple[int, ...]
    """Indices of layers that are given something else than the layer before returned."""
    caller: int
    """``id`` of the innermost model whose call all of theirs are part of."""
    width: int
    read_between: bool
    """Whether somebody reads what a layer returned beside the next one."""
    boxes: tuple[str, ...]
    """Arguments into which layers write what others read."""


class NoChain(Exception):
    """A list is none; says why, and where."""


def layer_lists(model: nn.Module) -> list[dict[str, nn.ModuleList]]:
    """Lists that may be of layers, to be tried in turn: those of transformers' own layer class; all there are."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(child is not None for child in module)
    }
    marked = {
        name: layers
        for name, layers in lists.items()
        if all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)
    }
    return [found for found in (marked, lists if len(lists) > len(marked) else {}) if found]


def find_chains(lists: dict[str, nn.ModuleList], seen: Trace, first: int) -> tuple[list[Chain], dict[str, str]]:
    """The stacks among ``lists``, outermost first; and of other lists that look like layers, why they are none.

    Args:
        lists: by name.
        seen: a forward through them.
        first: layers at the bottom that stay as they are, of which nothing is asked.
    """
    by_list: dict[str, list[Call]] = defaultdict(list)
    for call in seen.layers:
        by_list[call.name.rpartition(".")[0]].append(call)
    found: list[Chain] = []
    refused: dict[str, str] = {}
    for name in sorted(lists, key=lambda name: (name.count("."), name)):
        if any(name.startswith(f"{chain.name}.") for chain in found):
            continue
        try:
            found.append(_chain(name, list(lists[name]), by_list[name], first))
        except NoChain as reason:
            refused[name] = str(reason)
    inside = [name for name in refused if any(name.startswith(f"{other.name}.") for other in found)]
    return found, {name: reason for name, reason in refused.items() if name not in inside}


def _chain(name: str, layers: list[nn.Module], calls: list[Call], first: int) -> Chain:
    if not calls:
        raise NoChain("its layers were not called")
    for call in calls:
        if (reason := _no_layer(call)) is not None:
            raise NoChain(f"{call.name} {reason}")
    order = [f"{name}.{index}" for index in range(len(layers))]
    rounds = _joined(_passes(calls))
    called = [call.name for call in rounds[0]]
    if any(len({call.name for call in calls}) < len(calls) for calls in rounds):
        _check_shared(rounds, order, first)
    else:
        for calls in rounds:
            _check_order(order, [call.name for call in calls])
    pairs = [list(itertools.pairwise(calls[first:])) for calls in rounds]
    begins = tuple(first + at for at in range(1, len(rounds[0]) - first) if not all(_linked(*p[at - 1]) for p in pairs))
    if begins and len(begins) == len(order) - first - 1:
        _refuse_changed(next(pair for every in pairs for pair in every if not _linked(*pair)))
    between = any(_read_elsewhere(*pair) for every in pairs for pair in every if _linked(*pair))
    calls = rounds[0]
    assert calls[0].given is not None
    boxes = tuple(dict.fromkeys(box for call in calls for box in call.filled))
    places = {label: index for index, label in enumerate(order)}
    models = [model for model in calls[0].models if all(model in call.models for every in rounds for call in every)]
    return Chain(
        name=name,
        layers=layers,
        calls=calls,
        order=tuple(places[each] for each in called),
        begins=begins,
        caller=models[-1],
        width=calls[0].given.shape[-1],
        read_between=between,
        boxes=boxes,
    )


def _no_layer(call: Call) -> str | None:
    """Why what was called is no layer that takes hidden states and returns them."""
    given, returned = call.given, call.returned
    if given is None:
        return "takes no hidden states first"
    if returned is None:
        return f"returns no hidden states first, but {type(call.output).__name__}"
    if given.shape != returned.shape or given.dim() < 2:
        return f"turns {tuple(given.shape)} into {tuple(returned.shape)}"
    if not given.is_floating_point() or given.dtype != returned.dtype:
        return f"turns {given.dtype} into {returned.dtype}"
    if call.overwritten:
        return "writes into the hidden states that it is given, which others read"
    if lists := [name for name in call.filled if isinstance(call.boxes[name], list)]:
        return f"writes into its argument {lists[0]}, a list: a state beside the hidden states"
    if sum(parameter.dim() > 1 for parameter in call.module.parameters()) < 2:
        return "has less than two weight matrices"
    if not any(_reads_width(module, given.shape[-1]) for module in call.module.modules()):
        return f"has nothing that reads the last dimension ({given.shape[-1]}): channels come first"
    return None


def _reads_width(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    shape = tuple(getattr(weight, "shape", ()))
    if isinstance(module, nn.Linear):
        return module.in_features == width
    if type(module).__name__ == "Conv1D":
        return shape[:1] == (width,)
    return "norm" in type(module).__name__.lower() and shape[-1:] == (width,)


def _passes(calls: list[Call]) -> list[list[Call]]:
    """The calls, cut where a module comes again."""
    passes: list[list[Call]] = [[]]
    for call in calls:
        if any(call.module is other.module for other in passes[-1]):
            passes.append([])
        passes[-1].append(call)
    return passes


def _joined(passes: list[list[Call]]) -> list[list[Call]]:
    """The passes, those as one that go on with what the one before gave: the layers are shared."""
    rounds: list[list[Call]] = []
    for calls in passes:
        if rounds and _linked(rounds[-1][-1], calls[0]):
            rounds[-1] += calls
        else:
            rounds.append(calls)
    return rounds


def _check_shared(rounds: list[list[Call]], order: list[str], first: int) -> None:
    if missing := [name for name in order if all(call.name != name for call in rounds[0])]:
        raise NoChain(f"layers run several times in a pass, and {missing[0]} was not called")
    if first:
        raise NoChain("its layers run several times in a pass: frozen_layers can leave none of them out")
    for calls in rounds:
        if [call.name for call in calls] != [call.name for call in rounds[0]]:
            raise NoChain("its layers run several times in a pass, and not in the same order each time")
        for pair in itertools.pairwise(calls):
            if not _linked(*pair):
                _refuse_changed(pair)


def _check_order(order: list[str], called: list[str]) -> None:
    if called == order:
        return
    if missing := [name for name in order if name not in called]:
        raise NoChain(f"{missing[0]} was not called: layers run only sometimes, or the forward ends early")
    at = next(index for index, (one, other) in enumerate(zip(order, called, strict=False)) if one != other)
    raise NoChain(f"{called[at]} was called where {order[at]} was due: layers run in another order than they stand")


def _linked(before: Call, after: Call) -> bool:
    one, other = before.returned, after.given
    return (
        one is not None
        and other is not None
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and before.returned_version == after.given_version
        and after.start > before.end
    )


def _refuse_changed(pair: tuple[Call, Call]) -> None:
    before, after = pair
    glue = dict.fromkeys(name for name, inside in before.readers if inside is None)
    by = f" (by {', '.join(list(glue)[:4])})" if glue else ""
    raise NoChain(
        f"hidden states change between {before.name} and {after.name}{by}: states are injected between layers, or the "
        f"model's own code works on them (frozen_layers={after.name.rpartition('.')[2]} leaves what is below as it is)"
    )


def _read_elsewhere(call: Call, after: Call) -> bool:
    if any(inside is None or not after.contains(inside) for _, inside in call.readers):
        return True
    # As keys and values, say, which the engine hands on as they are: a stream's place is the first argument alone.
    return any(call.returned is not None and is_same(other, call.returned) for other in after.others)
