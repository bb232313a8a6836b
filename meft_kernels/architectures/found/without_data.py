"""What is found of a model whose weights hold no data (an estimate's, a plan's): of a small copy that has some."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from .layers import FoundLayers
from .sample import MOST, shallow
from .spec import FoundArchitecture, find, unsupported

ENOUGH = 1e8
"""Weights of a copy that is made as wide as the model; a wider one is made narrow."""
WORDS = 1000
NARROWER = 8
"""By how much at most."""
_WIDTHS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "d_model", "d_ff",
    "n_embd", "n_inner", "ffn_dim", "word_embed_proj_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads",
)  # fmt: skip

_known: dict[tuple[Any, ...], FoundArchitecture] = {}
"""Of the last copies: an estimate asks for the same few again and again."""


def has_no_data(model: nn.Module) -> bool:
    """Whether weights are there by their shapes alone, in a simulation."""
    return any(isinstance(parameter, FakeTensor) for parameter in model.parameters())


def find_on_a_copy(
    model: Any,
    *,
    frozen_layers: int = 0,
    wanted: tuple[str, ...] | None = None,
    saved: Sequence[FoundLayers] = (),
) -> FoundArchitecture:
    """The spec of a model without data, found on a copy with random weights, few layers and few words.

    Args:
        model: a transformers model of a class that is made from a config.
        frozen_layers, wanted, saved: see :func:`.find`; of the frozen ones half of the copy's layers at the most.

    Raises:
        UnsupportedModelError: no such copy can be made, or nothing was found of it that holds.
    """
    key = type(model), frozen_layers, wanted, tuple(saved), model.config.to_json_string(use_diff=False)
    if key not in _known:
        with _disable_current_modes(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            made = _small_copy(model)
            depth = max((len(part) for part in made.modules() if isinstance(part, nn.ModuleList)), default=0)
            found = find(made, frozen_layers=min(frozen_layers, depth // 2), wanted=wanted, saved=saved)
        while len(_known) > 16:
            _known.pop(next(iter(_known)))
        lists = [layers for layers in found.layers if isinstance(layers, FoundLayers)]
        _known[key] = dataclasses.replace(found, layers=tuple(_in_its_length(model, layers) for layers in lists))
    return _known[key]


def _in_its_length(model: Any, layers: FoundLayers) -> FoundLayers:
    """What was found of a list of few layers, of the model's own list."""
    if layers.order != tuple(range(len(layers.order))) or layers.begins(None):
        raise unsupported(
            model.config.model_type,
            [
                f"its weights are without data, and the layers of {layers.list_name} are called several times, or in "
                "runs: how often cannot be seen of a small copy"
            ],
        )
    return dataclasses.replace(layers, order=tuple(range(len(model.get_submodule(layers.list_name)))))


def _small_copy(model: Any) -> Any:
    """Of few layers, with few words; narrow where it would still be large, or where it cannot be made otherwise."""
    wide = _with_few_words(shallow(copy.deepcopy(model.config)))
    narrow = _narrow(copy.deepcopy(wide))
    errors = []
    for config in (wide, narrow) if _weights(type(model), wide) <= ENOUGH else (narrow, wide):
        try:
            if MOST < (size := _weights(type(model), config)) < math.inf:
                raise ValueError(f"{size / 1e9:.1f} billion weights, where {MOST / 1e9:.0f} are looked at")
            made = type(model)(config)
        except Exception as error:  # a model's own code may refuse sizes in any way
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        _fill(made)
        return made.eval()
    raise unsupported(
        model.config.model_type,
        [f"its weights are without data, and no small copy of it can be made to look at ({errors[0]})"],
    )


def _weights(model_class: Any, config: Any) -> float:
    """How many there would be; infinitely many where it cannot be made."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    except Exception:
        return math.inf


def _parts(config: Any) -> list[Any]:
    """The config, and those inside it."""
    inner = [getattr(config, name, None) for name in getattr(type(config), "sub_configs", {}) or {}]
    return [config, *(part for part in inner if part is not None and not isinstance(part, dict))]


def _with_few_words(config: Any) -> Any:
    for part in _parts(config):
        words = getattr(part, "vocab_size", None)
        if not isinstance(words, int) or words <= WORDS:
            continue
        part.vocab_size = WORDS
        for name, value in list(vars(part).items()):
            if name.endswith(("_token_id", "_token_index")):
                setattr(part, name, [_word(each) for each in value] if isinstance(value, list) else _word(value))
    return config


def _word(value: Any) -> Any:
    return min(value, WORDS - 1) if isinstance(value, int) else value


def _narrow(config: Any) -> Any:
    """With less heads, and all widths in proportion; heads keep their width."""
    for part in _parts(config):
        named = {name: getattr(part, name, None) for name in (*_WIDTHS, *_HEADS)}
        sizes = {name: value for name, value in named.items() if isinstance(value, int) and value}
        by = math.gcd(NARROWER, *sizes.values())
        for name, value in sizes.items():
            setattr(part, name, value // by)
    return config


def _fill(model: nn.Module) -> None:
    """Random weights with which every part matters, whatever the class's own initialisation does or leaves out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                noise *= parameter.shape[-1] ** -0.5
            else:
                noise = noise * 0.05 + (0.0 if name.endswith("bias") else 1.0)
            parameter.copy_(noise)
