"""From a few layers to all of them: bytes = a + b * layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .step import StepBytes

MIN_LAYERS = 2


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


def sample_depths(config: Any) -> list[int]:
    """Two depths that show what a layer adds, whole periods of unlike layers apart; or all layers, where few are left.

    An encoder-decoder model is taken whole: its two stacks grow in different ways.
    """
    depth = depth_of(config)
    if config.is_encoder_decoder:
        return [depth]
    layers = [str(layer) for layer in zip(*_lists(config).values(), strict=True)]  # each with all that is said of it
    period = next(p for p in range(1, depth + 1) if layers[p:] == layers[: len(layers) - p])
    first = depth % period or period
    while first < MIN_LAYERS:
        first += period
    second = first + max(period, -(-MIN_LAYERS // period) * period)
    return [first, second] if first + second < depth else [depth]


def extrapolate(config: Any, simulate: Callable[[Any], StepBytes]) -> StepBytes:
    """The bytes of the whole model, from :func:`sample_depths` of it.

    All of them but the two peaks are straight lines. Forward's is at the loss or in the last layer, where it grows with
    what each layer keeps. Backward's is the highest of several places: at the loss or in the layer where backward
    begins, where it grows with that as well; or in the layer where it ends, where it grows with each layer's gradients.
    If it does not yet grow with the greater of the two, it may come to lie elsewhere in a deeper model, and all layers
    are simulated.
    """
    depths = sample_depths(config)
    if len(depths) == 1:
        return simulate(config)
    low, high = (simulate(with_depth(config, layers)) for layers in depths)
    apart = depths[1] - depths[0]
    slope = {f.name: (getattr(high, f.name) - getattr(low, f.name)) / apart for f in fields(StepBytes)}
    grown = {"forward": slope["kept"], "backward": max(slope["kept"], slope["gradients"])}
    if any(slope[place] < 0.999 * least for place, least in grown.items()):
        return simulate(config)
    further = depth_of(config) - depths[1]
    return StepBytes(**{name: round(getattr(high, name) + b * further) for name, b in slope.items()})
