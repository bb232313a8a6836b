"""What could be found of a model, from its config alone: random weights, few layers, few words."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..registry import find_architecture
from .spec import find

LAYERS = 4
"""As many as show the kinds of layers that take turns in most models."""
EXPERTS = 32
"""As many as can still be in the groups that routers choose among."""
MOST = 2e9
"""Weights of what is looked at, in float32."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth",
    "num_decoder_layers", "num_encoder_layers", "max_window_layers",
)  # fmt: skip


def look_at(name: str) -> str:
    """One line on whether a model can be patched, and how.

    Args:
        name: a hub id or folder with a config, or a ``config.model_type`` of transformers.

    Raises:
        ValueError: there is no such model, or transformers cannot make one of its config.
        UnsupportedModelError: it cannot be patched; says why.
    """
    import transformers

    try:
        if name in transformers.CONFIG_MAPPING:
            config = transformers.CONFIG_MAPPING[name]()
        else:
            config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"no model {name!r}: {str(error).splitlines()[0]}") from None
    if find_architecture(config.model_type) is not None:
        return f"{config.model_type} has a family file"
    return find(sample(config)).line


def sample(config: Any) -> Any:
    """A model of the config's widths with a few layers and random weights, in the class that its weights are in.

    Raises:
        ValueError: transformers cannot make it.
    """
    import transformers

    config = shallow(copy.deepcopy(config))
    names = [*(getattr(config, "architectures", None) or []), *_classes(config)]
    cls = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), transformers.AutoModel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in _make(cls, copy.deepcopy(config)).parameters())
            if size > MOST:
                raise ValueError(f"of {size / 1e9:.1f} billion weights, where {MOST / 1e9:.0f} are looked at")
            model = _make(cls, config)
        except Exception as error:
            raise ValueError(f"transformers makes no {cls.__name__} of few layers of this config: {error}") from None
    return model.eval()


def _make(cls: Any, config: Any) -> Any:
    return cls(config) if hasattr(cls, "forward") else cls.from_config(config)


def _classes(config: Any) -> list[str]:
    """The classes of a config that names none: with a head over words, else without any."""
    from transformers.models.auto import modeling_auto

    found = []
    for kind in ("IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "MASKED_LM"):
        mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {})
        if config.model_type in mapping:
            found.append(mapping[config.model_type])
    return [name for name in found if isinstance(name, str)]


def shallow(config: Any) -> Any:
    """The config, and those inside it, with a few layers of each kind."""
    before = {
        name: depth for name in _DEPTHS if isinstance(depth := getattr(config, name, None), int) and depth > LAYERS
    }
    for name in before:
        setattr(config, name, LAYERS)
    for name in _EXPERTS:
        if isinstance(count := getattr(config, name, None), int) and count > EXPERTS:
            setattr(config, name, EXPERTS)
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) in before.values() and len(value) > LAYERS:
            setattr(config, name, type(value)(_of_each_kind(list(value))))
    for name in getattr(type(config), "sub_configs", {}) or {}:
        inner = getattr(config, name, None)
        if inner is not None and not isinstance(inner, dict):
            shallow(inner)
    return config


def _of_each_kind(values: list[Any]) -> list[Any]:
    """The first few; where a kind is not among them, the first of it in the place of the last."""
    few = values[:LAYERS]
    left = [value for index, value in enumerate(values) if value not in values[:index] and value not in few]
    return [*few[: LAYERS - len(left)], *left][:LAYERS] if left and len(left) < LAYERS else few
