"""A few made-up inputs for a model, from its config and its forward's arguments alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

ROWS = 2
TOKENS = (8, 16, 64)
"""Of made-up texts: a few; more for models that look at blocks of tokens."""
SAMPLES = 4000
"""Of a made-up sound: some frames are left of it after a speech model's convolutions."""

Batch = dict[str, Any]


def made_up(model: Any) -> Iterator[Batch]:
    """Batches of a few tokens, patches or frames, likeliest first; whether the model takes one, trying tells.

    A model of several kinds of input is given text alone where it takes that: its language model is what runs then.
    """
    arguments = inspect.signature(model.forward).parameters
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for kind in sorted(_KINDS, key=lambda kind: kind != _preferred(model, arguments)):
        if kind not in arguments:
            continue
        for values in _KINDS[kind](model, generator):
            batch: Batch = {kind: values}
            if kind == "input_ids" and "attention_mask" in arguments:
                batch["attention_mask"] = torch.ones_like(values)
            if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in arguments:
                batch["decoder_input_ids"] = _ids(model, 6, generator)
            if "use_cache" in arguments:
                batch["use_cache"] = False
            yield {name: _placed(value, device, dtype) for name, value in batch.items()}


def _preferred(model: nn.Module, arguments: Any) -> str:
    return "input_ids" if "input_ids" in arguments else getattr(model, "main_input_name", "input_ids")


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def setting(config: Any, *names: str) -> Any:
    """The first of these that a config has, or one of the configs inside it."""
    inner = [getattr(config, name, None) for name in getattr(type(config), "sub_configs", {}) or {}]
    for place in (config, *inner):
        for name in names:
            value = getattr(place, name, None)
            if value is not None:
                return value
    return None


def _ids(model: Any, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Ordinary words: none of the ids that the config gives a meaning."""
    config = model.config
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # several texts: an encoder's and a decoder's
        text = config
    vocabulary = int(setting(text, "vocab_size") or 100)
    special: set[int] = set()
    for place in (config, text):
        for name, value in vars(place).items():
            if name.endswith(("_token_id", "_token_index")):
                special |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    ordinary = [token for token in range(min(vocabulary, 1000)) if token not in special] or [0]
    chosen = torch.randint(0, len(ordinary), (ROWS, tokens), generator=generator)
    return torch.tensor(ordinary)[chosen]


def _texts(model: Any, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for tokens in TOKENS:
        yield _ids(model, tokens, generator)
    yield _ids(model, TOKENS[0], generator).unsqueeze(1).repeat(1, 2, 1)  # of a multiple choice


def pair(value: Any, default: int) -> tuple[int, int]:
    """Height and width of what a config has as one number, two, or by name."""
    if isinstance(value, dict):
        value = (value.get("height", default), value.get("width", default))
    if isinstance(value, list | tuple):
        return int(value[0]), int(value[-1])
    return int(value or default), int(value or default)


def _images(model: Any, generator: torch.Generator) -> Iterator[torch.Tensor]:
    config = getattr(model.config, "vision_config", None) or model.config
    channels = setting(config, "num_channels", "in_channels", "in_chans") or 3
    channels = channels if isinstance(channels, int) else 3
    size = pair(setting(config, "image_size", "input_size"), 64)
    for shape in (size, (64, 64), (224, 224)):
        yield torch.randn(ROWS, channels, *shape, generator=generator)
    frames = setting(config, "num_frames") or 4
    yield torch.randn(ROWS, frames, channels, *size, generator=generator)


def _sounds(model: Any, generator: torch.Generator) -> Iterator[torch.Tensor]:
    yield torch.randn(ROWS, SAMPLES, generator=generator)
    bins = setting(model.config, "num_mel_bins") or 16
    yield torch.randn(ROWS, setting(model.config, "max_length") or 64, bins, generator=generator)
    yield torch.randn(ROWS, 1, SAMPLES, generator=generator)


def _spectrograms(model: Any, generator: torch.Generator) -> Iterator[torch.Tensor]:
    names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "n_mels", "input_dim")
    bins = setting(model.config, *names, "feature_size") or 80
    frames = 2 * (setting(model.config, "max_source_positions") or 32)
    yield torch.randn(ROWS, bins, frames, generator=generator)
    yield torch.randn(ROWS, 64, bins, generator=generator)


_KINDS: dict[str, Callable[[Any, torch.Generator], Iterator[torch.Tensor]]] = {
    "input_ids": _texts,
    "pixel_values": _images,
    "input_values": _sounds,
    "input_features": _spectrograms,
}
