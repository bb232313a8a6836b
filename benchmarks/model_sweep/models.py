"""Tiny random models of any model type that transformers maps, made from names alone, and batches that they take."""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .batches import NoBatch, batches
from .settings import OVERRIDES, Width, small
from .stand_ins import ImageTower, stand_in_for_timm

MOST = 4e7
"""Weights of a model that is tried."""
_SIZES: tuple[tuple[Width, int | None], ...] = (("small", None), ("small", 4), ("wide", 4), ("own", None))
_ORDER = (
    "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "MULTIMODAL_LM",
    "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "PRETRAINING", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING",
)  # fmt: skip


class CannotBeMade(Exception):
    """No tiny random model of this type runs; says what the first one said."""


def mappings() -> dict[str, dict[str, Any]]:
    """Tasks, with the classes that transformers has for them by model type."""
    names = [name for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES") and name != "CONFIG_MAPPING_NAMES"]
    short = {name: name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES") for name in names}
    return {short[name].removesuffix("_MAPPING"): dict(getattr(modeling_auto, name)) for name in names}


MAPPINGS = mappings()


def model_types() -> list[str]:
    """Every model type that transformers has a class for."""
    return sorted({model_type for mapping in MAPPINGS.values() for model_type in mapping})


def classes(model_type: str) -> list[str]:
    """Names of classes for a model type, those that people fine-tune most first, the bare model last."""
    others = [task for task in MAPPINGS if task not in _ORDER and task != "MODEL"]
    found: list[str] = []
    for task in (*_ORDER, *others, "MODEL"):
        names = MAPPINGS.get(task, {}).get(model_type) or ()
        found += [name for name in ((names,) if isinstance(names, str) else names) if name not in found]
    return found


def make(model_type: str) -> tuple[Any, dict[str, Any]]:
    """A tiny random model and a batch that it takes.

    Raises:
        CannotBeMade: none runs.
    """
    stand_in_for_timm()
    names = classes(model_type)
    bare = [name for name in names[3:] if name in str(MAPPINGS["MODEL"].get(model_type))]
    errors: list[str] = []
    for name in [*names[:3], *bare]:
        for width, layers in _SIZES:
            try:
                model = build(model_type, name, width, layers)
            except Exception as error:  # whatever a model's own code says
                errors.append(f"{name}: {_short(error)}")
                continue
            batch = _fitting_batch(model, errors)
            if batch is not None:
                return model, batch
    telling = [error for error in errors if "required positional argument" not in error]
    raise CannotBeMade([*telling, *errors, "no class"][0])


def build(model_type: str, name: str, width: Width, layers: int | None) -> Any:
    """A model of this class, in evaluation mode."""
    config = config_of(model_type, width, layers)
    cls = getattr(transformers, name)
    if issubclass(cls, ImageTower):
        raise CannotBeMade("needs timm, which is not installed")
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if size > MOST:
        raise CannotBeMade(f"{size / 1e6:.0f} million weights")
    torch.manual_seed(0)
    return cls(config).float().eval()


def config_of(model_type: str, width: Width, layers: int | None = None) -> Any:
    """A small config; settings that the class' own checks will not have are left out again."""
    config_class = CONFIG_MAPPING[model_type]
    settings = small(config_class, width, layers)
    for key, value in OVERRIDES.get(model_type, {}).items():
        both = isinstance(value, dict) and isinstance(settings.get(key), dict)
        settings[key] = {**settings[key], **value} if both else value
    for _ in range(12):
        try:
            config = config_class(**settings)
            break
        except Exception as error:  # name by name
            if not _leave_out(settings, str(error)):
                raise
    else:
        raise CannotBeMade("no settings fit")
    _fit_sections(config)
    return config


def _leave_out(settings: dict[str, Any], message: str) -> bool:
    for place in (settings, *[value for value in settings.values() if isinstance(value, dict)]):
        named = [key for key in place if re.search(rf"\b{re.escape(key)}\b", message)]
        if named or (named := [key for key in place if "layer_types" in key or "layers_block_type" in key]):
            del place[named[0]]
            return True
    return False


def _fit_sections(config: Any) -> None:
    """Sections of multimodal rotary embeddings that add up to half a small head."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" not in rope and _wants_sections(type(config)):
        rope["mrope_section"] = [16, 24, 24]
    if isinstance(rope, dict) and "mrope_section" in rope and not rope.get("mrope_interleaved"):
        heads = getattr(config, "num_attention_heads", None)
        width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        half = (
            int(width * (rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1)) // 2
        )
        count = len(rope["mrope_section"])
        if half and sum(rope["mrope_section"]) != half:
            rope["mrope_section"] = [half - (count - 1) * (half // count), *[half // count] * (count - 1)]
    for key in getattr(type(config), "sub_configs", {}) or {}:
        inner = getattr(config, key, None)
        if hasattr(inner, "to_dict"):
            _fit_sections(inner)


def _wants_sections(config_class: type) -> bool:
    """Whether the modelling code beside a config's reads sections that the config does not say."""
    if re.search("Vision|Audio|DiT|Token2Wav", config_class.__name__):
        return False
    beside = str(sys.modules[config_class.__module__].__file__).replace("configuration_", "modeling_")
    text = Path(beside).read_text(encoding="utf-8") if Path(beside).exists() else ""
    return "mrope_section" in text and "interleaved_mrope" not in text and "mrope_interleaved" not in text


def _fitting_batch(model: Any, errors: list[str]) -> dict[str, Any] | None:
    """The first batch that the model takes, and gives finite numbers for: with weights that matter, else its own."""
    own = copy.deepcopy(model.state_dict())
    for weights in (spread, lambda model: model.load_state_dict(own)):
        weights(model)
        for label, made in batches(model):
            try:
                batch = made()
                if "use_cache" in inspect.signature(model.forward).parameters:
                    batch["use_cache"] = False
                with torch.no_grad():
                    np.random.seed(3)
                    torch.manual_seed(3)
                    model.train()(**batch)  # some want labels then
                    values = list(floats(model.eval()(**batch)))
            except NoBatch:
                continue
            except Exception as error:  # whatever a model's own code says
                errors.append(f"{type(model).__name__}, {label}: {_short(error)}")
                continue
            if values and all(bool(torch.isfinite(value).all()) for value in values):
                return batch
            errors.append(f"{type(model).__name__}, {label}: not finite")
    return None


def _short(error: BaseException) -> str:
    """In one line; of a missing package, its name."""
    if missing := re.search(r"requires the (\S+) library", str(error)):
        return f"needs {missing[1]}, which is not installed"
    said = " ".join(str(error).split()).removeprefix("Class validation error for validator 'validate_architecture': ")
    return f"{type(error).__name__}: {said}"[:200]


def spread(model: nn.Module) -> None:
    """Weights of a size at which every part matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1:
                fan = parameter.shape[-1] if parameter.dim() == 2 else parameter[0].numel()
                nn.init.normal_(parameter, std=min(0.15, 1 / math.sqrt(max(1, fan))))
            elif key.endswith("bias"):
                nn.init.normal_(parameter, std=0.05)


MASKED = 1e30
"""Larger numbers are no outputs: they keep a softmax from somewhere (Splinter's start positions)."""
_NOT_OUTPUTS = ("past_key_values", "cache_params", "hidden_states", "attentions", "state", "rope_deltas")


def floats(output: Any, top: bool = True) -> Iterator[torch.Tensor]:
    """What a caller looks at of a model's output."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output.masked_fill((output.abs() > MASKED) & output.isfinite(), 0.0)
    elif isinstance(output, dict):
        for key, value in output.items():
            if not (top and key in _NOT_OUTPUTS):
                yield from floats(value, False)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from floats(value, False)
