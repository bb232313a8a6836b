"""What was found of a model is held to the model itself: its layers are functions of what they are handed, and no more.

A layer must give the same bits again from the same arguments, and the gradient that reaches its hidden states in the
model's own backward must be the one that its outputs' gradients give through the layer alone. What a layer has from
elsewhere (a state that it keeps, a cache, keys and values that others hand it in a box) fails one or the other.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from .blocks import Cut, LeftOut, cuts, without
from .chains import Chain
from .taps import Tap
from .trace import Call, Trace, first_tensor, parameter_names

_NOT_OUTPUTS = ("past_key_values", "hidden_states", "attentions", "encoder_hidden_states", "cache_params", "state")


class Unproven(Exception):
    """What was found does not hold; says what, and where."""


def arguments_of(call: Call) -> dict[str, Any]:
    """A layer call's arguments by name, without its hidden states and caches, as the engine hands them on.

    Tensors that need a gradient are leaves, mappings are new ones with what they held before the call.
    """
    from ...engine.arguments import without_cache

    names = parameter_names(call.module)
    named = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    named.pop(names[0])
    boxes = {name: dict(held) for name, held in call.held.items() if isinstance(held, dict | UserDict)}
    kwargs: dict[str, Any] = tree_map_only(torch.Tensor, _leaf_like, {**without_cache(named), **boxes})
    return {**kwargs, **{name: type(call.boxes[name])(kwargs[name]) for name in boxes}}


def again(call: Call, kwargs: dict[str, Any], hidden_states: torch.Tensor) -> Any:
    """The layer called once more."""
    return call.module.forward(hidden_states, **kwargs)


def prove_layers(chain: Chain, seen: Trace, first: int) -> None:
    """Hold every layer of a list from ``first`` on to what the engine asks of it.

    Raises:
        Unproven: one of them is not a function of its arguments.
    """
    calls = chain.calls[first:]
    gradients = _gradients(calls, seen.output)
    for call in calls:
        _prove(call, gradients)
        _prove_repeats(call)


class _Gradients(dict[int, "torch.Tensor | None"]):
    """By ``id`` of the tensor."""


def _gradients(calls: list[Call], output: Any) -> _Gradients:
    """What reaches every layer's hidden states, going in and coming out, from something that all outputs make up."""
    tensors = [tensor for call in calls for tensor in _ends(call)]
    unique = list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())
    total = _sum_of(output)
    found: tuple[torch.Tensor | None, ...] = ()
    if unique and total is not None and total.requires_grad:
        found = torch.autograd.grad(total, unique, allow_unused=True, retain_graph=True)
    if all(gradient is None for gradient in found):
        raise Unproven("no gradient goes from the model's outputs to its layers (they run under no_grad?)")
    return _Gradients({id(tensor): gradient for tensor, gradient in zip(unique, found, strict=True)})


def _ends(call: Call) -> list[torch.Tensor]:
    assert call.entered is not None
    return [call.entered, *_outputs(call.output), *_outputs(call.written)]


def _outputs(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def _sum_of(output: Any) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(0)
    total: torch.Tensor | None = None
    for value in _floats(output):
        if value.requires_grad:
            weights = torch.randn(value.shape, generator=generator).to(value.device)
            # Not squares, to which a norm is blind; nor the mean, whose gradients float16 has no numbers for.
            part = (value.float() * weights).sum() / math.sqrt(value.numel())
            total = part if total is None else total + part
    return total


def _floats(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            if key not in _NOT_OUTPUTS:
                yield from _floats(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _floats(value)


def _prove(call: Call, gradients: _Gradients) -> None:
    from ...engine.arguments import caches_in

    assert call.entered is not None and call.value is not None
    leaf = call.entered.detach().requires_grad_()
    kwargs = arguments_of(call)
    before = {name: dict(kwargs[name]) for name, box in call.boxes.items() if isinstance(box, dict | UserDict)}
    with torch.enable_grad():
        output = again(call, kwargs, leaf.view_as(leaf))
    made = first_tensor(output)
    if made is None or not torch.equal(made, call.value):
        handed = {**dict(zip(parameter_names(call.module), call.args, strict=False)), **call.kwargs}
        cache = " without its cache" if any(v is not None for v in caches_in(handed).values()) else ""
        raise Unproven(
            f"{call.name} gives something else when it is called again{cache} with the same arguments: it keeps a "
            "state, or computes in another way each time"
        )
    written = [v for name, held in before.items() for k, v in kwargs[name].items() if v is not held.get(k)]
    then, now = _outputs([call.output, call.written]), _outputs([output, written])
    if len(then) != len(now):
        raise Unproven(f"{call.name} returns {len(now)} tensors when it is called again, {len(then)} before")
    incoming = [gradients.get(id(tensor)) for tensor in then]
    flows = [(out, gradient) for out, gradient in zip(now, incoming, strict=True) if gradient is not None]
    if not flows:
        raise Unproven(f"nothing that the model returns depends on what {call.name} gives")
    (found,) = torch.autograd.grad([out for out, _ in flows], [leaf], [g for _, g in flows], allow_unused=True)
    expected = gradients.get(id(call.entered))
    if not _close(found, expected):
        raise Unproven(
            f"gradients go another way through {call.name} than from what it returns to what it is given: what it "
            "computes is read elsewhere (keys and values shared across layers, say)"
        )


def _leaf_like(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor


def _close(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if found is None or expected is None:
        one = expected if found is None else found
        return one is None or not one.any()
    off = float((found.double() - expected.double()).norm())
    return off <= math.sqrt(torch.finfo(expected.dtype).eps) * float(expected.double().norm())


def _prove_repeats(call: Call) -> None:
    """In training, too, the global generators decide all that is random in it."""
    from ...engine.replay import seeded

    module = call.module
    if getattr(module, "gradient_checkpointing", False):
        return  # refused elsewhere
    modes = [(part, part.training) for part in module.modules()]
    assert call.entered is not None
    try:
        module.train()
        made = []
        for _ in range(2):
            with torch.no_grad(), seeded(0, call.entered.device):
                made.append(first_tensor(again(call, arguments_of(call), call.entered.detach())))
    finally:
        for part, mode in modes:
            part.training = mode
    if made[0] is None or made[1] is None or not torch.equal(made[0], made[1]):
        raise Unproven(
            f"{call.name} in training gives something else each time from the same random numbers: it draws them from "
            "a generator of its own, or keeps a state"
        )


def prove_cut(call: Call, parts: list[Call], tap: Tap, *, by_rows: bool) -> Cut | None:
    """How a layer can be taken apart into an attention block and an MLP block, bit for bit.

    Args:
        call: the layer's.
        parts: the calls of its modules, in time.
        tap: its FFN.
        by_rows: whether to see, too, that the MLP block computes every row for itself; once for a kind of layers.
    """
    if tap.writes == "":
        return None
    for attention, mlp in cuts(parts, tap.writes, call):
        try:
            if _cut_holds(call, attention, mlp, by_rows):
                return attention, mlp
        except Exception:  # a layer's own code may do anything with what a part left out gives
            continue
    return None


def _cut_holds(call: Call, attention: tuple[LeftOut, ...], mlp: tuple[LeftOut, ...], by_rows: bool) -> bool:
    assert call.entered is not None and call.value is not None
    forward = type(call.module).forward
    hidden_states = call.entered.detach()
    with torch.enable_grad():
        output = forward(without(call.module, attention), hidden_states.requires_grad_(), **arguments_of(call))
        attended = first_tensor(output)
        if attended is None:
            return False
        attended = attended.detach().requires_grad_()
        rebuilt = first_tensor(forward(without(call.module, mlp), attended, **arguments_of(call)))
        if rebuilt is None or not torch.equal(rebuilt, call.value) or torch.equal(attended, rebuilt):
            return False
        if torch.equal(attended, hidden_states) or not _same_extras(output, call.output):
            return False
        for rows in _some_rows(attended) if by_rows else []:
            part = first_tensor(forward(without(call.module, mlp), attended[rows], **arguments_of(call)))
            if not _rows_agree(rows, rebuilt, part):
                return False
        return True


def _some_rows(hidden_states: torch.Tensor) -> list[Any]:
    """Tiles as the engine cuts them: of a part of one text, and of whole texts."""
    if hidden_states.dim() not in (2, 3):
        return []  # never cut
    few = slice(0, max(1, hidden_states.shape[-2] // 2))
    return [few] if hidden_states.dim() == 2 else [(slice(0, 1), few), (slice(0, 1), slice(None))]


def _rows_agree(rows: Any, whole: torch.Tensor, part: torch.Tensor | None) -> bool:
    """A product over fewer rows may round otherwise."""
    if part is None or part.shape != whole[rows].shape:
        return False
    off = float((part.detach().double() - whole[rows].detach().double()).norm())
    return off <= math.sqrt(torch.finfo(whole.dtype).eps) * float(whole[rows].detach().double().norm())


def _same_extras(output: Any, expected: Any) -> bool:
    found, wanted = _extras(output), _extras(expected)
    if len(found) != len(wanted):
        return False
    return all(_same(one, other) for one, other in zip(found, wanted, strict=True))


def _extras(output: Any) -> list[Any]:
    return list(output[1:]) if isinstance(output, tuple | list) else []


def _same(one: Any, other: Any) -> bool:
    leaves: Iterable[tuple[Any, Any]] = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b or a == b for a, b in leaves)
