"""From a few layers to all of them: bytes = a + b * layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .step import StepBytes

MIN_LAYERS = 2

Parts = tuple[int, ...]
"""Numbers of layers, from the bottom up, of parts of a model that are not alike."""


def depth_of(config: Any) -> int:
    """Layers; of the encoder, where there are two stacks."""
    return int(config.get_text_config().num_hidden_layers)


def _lists(config: Any) -> dict[str, list[Any]]:
    """What the config says of every layer, one by one."""
    depth = depth_of(config)
    return {k: list(v) for k, v in vars(config).items() if isinstance(v, list | tuple) and len(v) == depth}


def with_depth(config: Any, layers: int) -> Any:
    """The same model with fewer layers, from the bottom up."""
    per_layer = _lists(config)
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    for name, values in per_layer.items():
        if name in ("layer_types", "mlp_layer_types") or not isinstance(values[0], str):
            setattr(config, name, values[:layers])
    return config


def _period(config: Any) -> int:
    """After how many layers the config says the same of layers again."""
    depth = depth_of(config)
    layers = [str(layer) for layer in zip(*_lists(config).values(), strict=True)]  # each with all that is said of it
    return next(p for p in range(1, depth + 1) if layers[p:] == layers[: len(layers) - p])


def _samples(layers: int, period: int) -> tuple[int, int]:
    """Two numbers of layers that show what one adds, whole periods of unlike layers apart."""
    first = layers % period or period
    while first < MIN_LAYERS:
        first += period
    return first, first + max(period, -(-MIN_LAYERS // period) * period)


def sample_depths(config: Any) -> list[int]:
    """Two depths that show what a layer adds, whole periods of unlike layers apart; or all layers, where few are left.

    An encoder-decoder model is taken whole: its two stacks grow in different ways.
    """
    return [sum(parts) for parts in sample_parts(config, (depth_of(config),))]


def sample_parts(config: Any, parts: Parts) -> list[Parts]:
    """As few layers of every part as there may be, and for each part that has more the same with more of it.

    All layers alone, where few would be left out.
    """
    depth = depth_of(config)
    if config.is_encoder_decoder:
        return [parts]
    period = _period(config)
    few: list[int] = []
    more: list[int | None] = []
    for layers in parts:
        first, second = _samples(layers, period)
        few.append(first if second < layers else layers)
        more.append(second if second < layers else None)
    asked = [tuple(few)]
    for place, further in enumerate(more):
        if further is not None:
            asked.append((*few[:place], further, *few[place + 1 :]))
    return asked if len(asked) > 1 and sum(map(sum, asked)) < depth else [parts]


def extrapolate(config: Any, simulate: Callable[[Any, Parts], StepBytes], parts: Parts | None = None) -> StepBytes:
    """The bytes of the whole model, from :func:`sample_parts` of it.

    All of them but the two peaks are straight lines. Forward's is at the loss or in the last layer, where it grows with
    what each layer keeps. Backward's is the highest of several places: at the loss or in the layer where backward
    begins, where it grows with that as well; or in the layer where it ends, where it grows with each layer's gradients.
    If it does not yet grow with the greater of the two, it may come to lie elsewhere in a deeper model, and all layers
    are simulated.

    Args:
        parts: layers that are not alike, from the bottom up: frozen ones, those that drop activations, those that keep
            them. None: all are alike.
    """
    parts = parts or (depth_of(config),)
    few, *more = sample_parts(config, parts)
    low = simulate(config if few == parts else with_depth(config, sum(few)), few)
    figures = {f.name: float(getattr(low, f.name)) for f in fields(StepBytes)}
    for grown in more:
        high = simulate(with_depth(config, sum(grown)), grown)
        place = next(i for i, (a, b) in enumerate(zip(few, grown, strict=True)) if a != b)
        slope = {
            f.name: (getattr(high, f.name) - getattr(low, f.name)) / (grown[place] - few[place])
            for f in fields(StepBytes)
        }
        least = {"forward": slope["kept"], "backward": max(slope["kept"], slope["gradients"])}
        if any(slope[at] < 0.999 * bound for at, bound in least.items()):
            return simulate(config, parts)
        for name, each in slope.items():
            figures[name] += each * (parts[place] - few[place])
    return StepBytes(**{name: round(value) for name, value in figures.items()})
