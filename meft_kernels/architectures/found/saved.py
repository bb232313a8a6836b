"""What was found of a model's layers as plain values, for an adapter's file, and back: a model is then held to it.

An adapter is loaded where there may be no batch that shows all that was seen when it was trained: images that go in
between layers, a vision tower. What is seen again must be the same; the rest is taken from the file, if the model has
the parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from .blocks import Kind, LeftOut, Without, kind_of
from .layers import FoundLayers
from .taps import Tap


class Differs(Exception):
    """The model is not what was written down; says where."""


def to_plain(layers: FoundLayers) -> dict[str, Any]:
    """What was found of one list, ready for JSON."""
    cuts = [_parts(layers.attention_block), _parts(layers.mlp_block)]
    kinds = []
    for kind, tap in _taps(layers).items():
        attention, mlp = (None if parts is None else [list(_plain(part)) for part in parts[kind]] for parts in cuts)
        kinds.append(
            {"class": kind[0], "children": list(kind[1]), "ffn": list(tap), "attention": attention, "mlp": mlp}
        )
    return {
        "list": layers.list_name,
        "owner": layers.owner_name,
        "classes": list(layers.class_names),
        "calls": list(layers.order),
        "begins": list(layers.begins(None)),
        **{name: getattr(layers, name)(None) for name in _CONSTANTS},
        "read_between": layers.read_between,
        "boxes": list(layers.boxes),
        "kinds": kinds,
    }


_CONSTANTS = ("hidden_size", "post_norm", "layerdrop", "activation", "dropout")


def from_plain(value: Any) -> FoundLayers:
    """The inverse.

    Raises:
        ValueError: it is not what :func:`to_plain` writes.
    """
    try:
        kinds: list[Kind] = [(str(each["class"]), tuple(map(str, each["children"]))) for each in value["kinds"]]
        taps = {kind: Tap(*map(str, each["ffn"])) for kind, each in zip(kinds, value["kinds"], strict=True)}
        attention, mlp = (
            {kind: _left_out(each[name]) for kind, each in zip(kinds, value["kinds"], strict=True)}
            for name in ("attention", "mlp")
        )
        order = tuple(map(int, value["calls"]))
        if not kinds or sorted({*order}) != list(range(max(order) + 1)):
            raise ValueError("calls are not indices of layers, each of them once at least")
        return FoundLayers.of(
            taps,
            attention,
            mlp,
            apart=all(attention.values()) and all(mlp.values()),
            constants={
                "post_norm": bool(value["post_norm"]),
                "layerdrop": float(value["layerdrop"]),
                "activation": str(value["activation"]),
                "dropout": float(value["dropout"]),
                "hidden_size": int(value["hidden_size"]),
                "begins": tuple(map(int, value["begins"])),
            },
            layer_class=tuple(map(str, value["classes"])),
            read_between=bool(value["read_between"]),
            boxes=tuple(map(str, value["boxes"])),
            list_name=str(value["list"]),
            order=order,
            owner_name=str(value["owner"]),
        )
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _taps(layers: FoundLayers) -> Mapping[Kind, Tap]:
    taps: dict[Kind, Tap] = layers.ffn_reads.taps.values  # type: ignore[attr-defined]
    return taps


def _parts(block: Any) -> Mapping[Kind, tuple[LeftOut, ...]] | None:
    return block.parts.values if isinstance(block, Without) else None


def _plain(part: LeftOut) -> tuple[Any, ...]:
    return tuple(getattr(part, field.name) for field in dataclasses.fields(part))


def _left_out(values: Any) -> tuple[LeftOut, ...] | None:
    if values is None:
        return None
    parts = tuple(LeftOut(*value) for value in values)
    for part in parts:
        numbers = (part.residual, part.outputs)
        if not (
            isinstance(part.path, str)
            and all(number is None or isinstance(number, int) for number in numbers)
            and isinstance(part.width, int)
            and isinstance(part.flat, bool)
        ):
            raise ValueError(f"{part} is no part of a layer")
    return parts


def taken_up(model: nn.Module, saved: FoundLayers, found: FoundLayers | None, first: int) -> FoundLayers:
    """The layers as they were written down, held to what was found of them now, None where nothing was.

    Args:
        model: not patched.
        saved: what was written down of a list.
        found: what the model was seen to do with it.
        first: layers at the bottom that stay as they are.

    Raises:
        Differs: it is not the same.
    """
    _check_parts(model, saved, first)
    if found is None:
        return saved
    for what in ("class_names", "order", "owner_name", "boxes"):
        _check_same(saved, what, getattr(found, what), getattr(saved, what))
    _check_same(saved, "the width", found.hidden_size(None), saved.hidden_size(None))
    for kind, tap in _taps(found).items():
        _check_same(saved, f"the FFN of {kind[0]}", tuple(tap), tuple(_taps(saved).get(kind, ())))
    if unknown := [place for place in found.begins(None) if place not in saved.begins(None)]:
        raise Differs(
            f"{saved.list_name}: hidden states change below layer {unknown[0]}, and did not when the adapter was saved"
        )
    if saved.apart and not found.apart:
        raise Differs(f"{saved.list_name}: its layers cannot be taken apart any more as they were")
    return dataclasses.replace(saved, read_between=saved.read_between or found.read_between)


def _check_same(saved: FoundLayers, what: str, here: Any, there: Any) -> None:
    if here != there:
        raise Differs(f"{saved.list_name}: {what} is {here!r}, and was {there!r} when the adapter was saved")


def _check_parts(model: nn.Module, saved: FoundLayers, first: int) -> None:
    """Whether the model has all the parts that are named."""
    modules = dict(model.named_modules())
    layers = modules.get(saved.list_name)
    if not isinstance(layers, nn.ModuleList):
        raise Differs(f"it holds no list of layers {saved.list_name}")
    if saved.owner_name not in modules:
        raise Differs(f"it has no part {saved.owner_name}")
    _check_same(saved, "the number of layers", len(layers), max(saved.order) + 1)
    for index, layer in enumerate(layers):
        if index < first:
            continue
        tap = _taps(saved).get(kind_of(layer))
        if tap is None:
            raise Differs(
                f"{saved.list_name}.{index} is a {type(layer).__name__} of other parts than there were when the "
                "adapter was saved"
            )
        width = saved.hidden_size(None)
        if not any(width in parameter.shape for parameter in layer.parameters()):
            raise Differs(f"{saved.list_name}.{index} has no weight of the width {width}")
        inside = dict(layer.named_modules())
        paths = [*tap, *(part.path for block in (saved.attention_block, saved.mlp_block) for part in _of(block, layer))]
        if missing := [path for path in paths if path not in inside]:
            raise Differs(f"{saved.list_name}.{index} has no part {missing[0]}")


def _of(block: Any, layer: nn.Module) -> tuple[LeftOut, ...]:
    parts = _parts(block)
    return () if parts is None else parts[kind_of(layer)]
