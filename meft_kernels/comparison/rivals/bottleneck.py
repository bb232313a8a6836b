"""A bottleneck adapter parallel to every FFN (He et al. 2022), our own module without reversible streams."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ...architectures.layer_lists import find_layers
from ...engine.adapters import FfnTap
from ...patching.insertion import make_adapters
from ...patching.state import unwrap
from ...patching.targets import find_spec, modules_to_train, parts_named
from .base import Budget, Rival


class _AlwaysOn:
    bypassed = False


def bottleneck(model: Any, budget: Budget) -> nn.Module:
    """Twice MEFT's rank, for MEFT has two adapters a layer."""
    config = dataclasses.replace(budget.config, rank=2 * budget.config.rank)
    spec = find_spec(model, config)
    lists = find_layers(unwrap(model), spec, config.stacks)
    trained = modules_to_train(model, lists, spec, config)
    model.requires_grad_(False)
    for part in parts_named(model, trained):
        part.requires_grad_(True)
    for found in lists:
        for layer in found.layers:
            adapter = make_adapters(layer, found.spec, found.hidden_size, model, spec, config)["ffn"]
            layer.add_module("bottleneck", adapter)
            FfnTap(adapter, _AlwaysOn()).follow(found.spec.ffn_reads(layer), found.spec.ffn_writes(layer))
    return model


RIVALS = (Rival("bottleneck", "parallel adapters", bottleneck),)
