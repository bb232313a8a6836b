"""What was found of a model is held to the model itself: its layers are functions of what they are handed, and no more.

A layer must give the same bits again from the same arguments, and the gradient that reaches its hidden states in the
model's own backward must be the one that its outputs' gradients give through the layer alone. What a layer has from
elsewhere (a state that it keeps, a cache, keys and values that others hand it in a box) fails one or the other.

One layer of a kind is held to it, the last, to which the backward is shortest; what a kind is says :mod:`.alike`, which
looks at every layer's graph. With so few tokens a call costs what the weights do that it reads: with every layer called
again, the proof took as long as ten forwards.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ...modules import modules_of
from .alike import Unproven, outputs_of
from .blocks import Cut, LeftOut, cuts, without
from .taps import Tap
from .trace import Call, first_tensor, parameter_names

_NOT_OUTPUTS = ("past_key_values", "hidden_states", "attentions", "encoder_hidden_states", "cache_params", "state")


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


def gradients_at(calls: list[Call], output: Any) -> Gradients:
    """What reaches these layers' hidden states, going in and coming out, from something that all outputs make up."""
    tensors = [tensor for call in calls for tensor in (call.entered, *outputs_of([call.output, call.written]))]
    unique = list({id(tensor): tensor for tensor in tensors if tensor is not None and tensor.requires_grad}.values())
    total = _sum_of(output)
    found: tuple[torch.Tensor | None, ...] = (None,) * len(unique)
    if unique and total is not None and total.requires_grad:
        found = torch.autograd.grad(total, unique, allow_unused=True)
    return Gradients({id(tensor): gradient for tensor, gradient in zip(unique, found, strict=True)})


class Gradients(dict[int, "torch.Tensor | None"]):
    """By ``id`` of the tensor."""


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


def prove(call: Call, gradients: Gradients) -> None:
    """Hold a layer to what the engine asks of it: the same bits again, in training too, and no other way for gradients.

    Args:
        call: the layer's.
        gradients: what went through it in the model's own backward.

    Raises:
        Unproven: it is not a function of its arguments.
    """
    assert call.value is not None
    # Refused elsewhere where layers are checkpointed, so that it does not matter what they would do.
    trains = not getattr(call.module, "gradient_checkpointing", False)
    trained = _again(call, training=True) if trains else None
    repeated = trained
    if repeated is None or not _equal(repeated, call.value):
        repeated = _again(call)
    if not _equal(repeated, call.value):
        raise Unproven(
            f"{call.name} gives something else when it is called again{_without_cache(call)} with the same arguments: "
            "it keeps a state, or computes in another way each time"
        )
    _prove_gradients(call, repeated, gradients)
    if trained is None or trained is repeated:
        return
    value = first_tensor(trained.output)
    if value is None or not _equal(_again(call, training=True), value):
        raise Unproven(
            f"{call.name} in training gives something else each time from the same random numbers: it draws them from "
            "a generator of its own, or keeps a state"
        )


class _Again(NamedTuple):
    """A layer called once more, from a leaf."""

    leaf: torch.Tensor
    output: Any
    written: list[Any]
    """What it put into its boxes."""


def _again(call: Call, *, training: bool = False) -> _Again:
    from ...engine.replay import seeded
    from ...engine.surroundings import buffers_kept

    assert call.entered is not None
    leaf = call.entered.detach().requires_grad_()
    kwargs = arguments_of(call)
    before = {name: dict(kwargs[name]) for name, box in call.boxes.items() if isinstance(box, dict | UserDict)}
    modes = [(part, part.training) for part in modules_of(call.module)]
    try:
        call.module.train(training)
        with torch.enable_grad(), buffers_kept(call.module), seeded(0 if training else None, leaf.device):
            output = call.module.forward(leaf.view_as(leaf), **kwargs)
    except Exception as error:
        if not training:
            raise
        # RF-DETR's decoder, say, which takes thirteen times as many queries in training and looks for them.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unproven(f"{call.name} in training does not take what a model in eval mode gives it: {reason}") from error
    finally:
        for part, mode in modes:
            part.training = mode
    written = [v for name, held in before.items() for k, v in kwargs[name].items() if v is not held.get(k)]
    return _Again(leaf, output, written)


def _equal(again: _Again, value: torch.Tensor) -> bool:
    made = first_tensor(again.output)
    return made is not None and torch.equal(made, value)


def _without_cache(call: Call) -> str:
    from ...engine.arguments import caches_in

    handed = {**dict(zip(parameter_names(call.module), call.args, strict=False)), **call.kwargs}
    return " without its cache" if any(cache is not None for cache in caches_in(handed).values()) else ""


def _prove_gradients(call: Call, again: _Again, gradients: Gradients) -> None:
    then, now = outputs_of([call.output, call.written]), outputs_of([again.output, again.written])
    if len(then) != len(now):
        raise Unproven(f"{call.name} returns {len(now)} tensors when it is called again, {len(then)} before")
    incoming = [gradients.get(id(tensor)) for tensor in then]
    flows = [(out, gradient) for out, gradient in zip(now, incoming, strict=True) if gradient is not None]
    if not flows:
        raise Unproven(f"nothing that the model returns depends on what {call.name} gives")
    (found,) = torch.autograd.grad([out for out, _ in flows], [again.leaf], [g for _, g in flows], allow_unused=True)
    if not _close(found, gradients.get(id(call.entered))):
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


def prove_cut(call: Call, parts: list[Call], tap: Tap, *, post_norm: bool) -> Cut | None:
    """How a layer can be taken apart into an attention block and an MLP block, bit for bit.

    Args:
        call: the layer's.
        parts: the calls of its modules, in time.
        tap: its FFN.
        post_norm: whether the layer ends in a norm of all its output, which makes a difference to where to begin.
    """
    if tap.writes == "":
        return None
    for attention, mlp in cuts(parts, tap, call, post_norm=post_norm):
        try:
            if _cut_holds(call, attention, mlp):
                return attention, mlp
        except Exception:  # a layer's own code may do anything with what a part left out gives
            continue
    return None


def _cut_holds(call: Call, attention: tuple[LeftOut, ...], mlp: tuple[LeftOut, ...]) -> bool:
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
        rows = _some_rows(attended)
        if rows is None:
            return True
        part = first_tensor(forward(without(call.module, mlp), attended[rows], **arguments_of(call)))
        return _rows_agree(rows, rebuilt, part)


def _some_rows(hidden_states: torch.Tensor) -> Any:
    """A tile as the engine cuts them, whose rows must come out as among all of them; None where it cuts none."""
    if hidden_states.dim() not in (2, 3):
        return None
    few = slice(0, max(1, hidden_states.shape[-2] // 2))
    return few if hidden_states.dim() == 2 else (slice(0, 1), few)


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
