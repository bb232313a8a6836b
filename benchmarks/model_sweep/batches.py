"""Batches for any model, by the names that its forward's arguments have: texts, images, sounds, series."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from meft_kernels.architectures.found.batch import pair, setting

Batch = dict[str, Any]
ROWS = 2


class NoBatch(Exception):
    """The model is none for a kind of batch."""


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _named(name: str, *shape: int) -> Batch:
    return {name: _random(*shape)}


def _with(others: Batch, name: str, *shape: int) -> Batch:
    return {**_named(name, *shape), **others}


def _ids(tokens: int) -> torch.Tensor:
    return torch.randint(5, 90, (ROWS, tokens), generator=torch.Generator().manual_seed(1))


def batches(model: Any) -> list[tuple[str, Callable[[], Batch]]]:
    """Functions that make batches, with their names, the richest first. They raise where the model is none for them."""
    known = inspect.signature(model.forward).parameters
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    channels = _whole(setting(vision, "num_channels", "in_channels", "in_chans"), 3)
    patch = _whole(setting(vision, "patch_size"), 4)
    frames = _whole(setting(vision, "temporal_patch_size"), 2)
    size = pair(setting(vision, "image_size", "input_size", "pretrain_image_size"), 16)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    flat = _random(32, channels * frames * patch * patch)
    still = _random(32, channels * patch * patch)
    squares = still.unflatten(1, (channels, patch, patch))
    found: list[tuple[str, Callable[[], Batch]]] = []
    if "input_ids" in known and "pixel_values" in known:
        images: dict[str, Batch] = {"plain": {"pixel_values": _random(ROWS, channels, *size)}}
        if "image_sizes" in known:
            images["sizes"] = {**images["plain"], "image_sizes": torch.tensor([list(size)] * ROWS)}
        if "image_grid_thw" in known:
            images["grid"] = {"pixel_values": flat, "image_grid_thw": grid}
            images["still grid"] = {"pixel_values": still, "image_grid_thw": grid}
        images["one each"] = {"pixel_values": _random(ROWS, 1, channels, *size)}
        if "pixel_attention_mask" in known:
            images["one each"]["pixel_attention_mask"] = torch.ones(ROWS, 1, *size, dtype=torch.bool)
        images["patches"] = _patches(known, channels, patch)
        found += [(f"image and text, {name}", partial(with_images, model, known, v)) for name, v in images.items()]
        for name in ("plain", "one each"):
            found.append((f"image and text, {name}, apart", partial(_apart, model, known, images[name])))
    if "input_ids" in known:
        found += [("text", lambda: _texts(model, known, 12)), ("text of 16", lambda: _texts(model, known, 16))]
        found += [("bare text", lambda: {"input_ids": _ids(16)}), ("text of 64", lambda: {"input_ids": _ids(64)})]
        if codes := _whole(setting(config, "num_codebooks"), 0):
            found.append(("codes", lambda: {"input_ids": _ids(12 * (codes + 1)).unflatten(1, (12, codes + 1))}))
            if "decoder_input_ids" in known:
                each = torch.cat([_ids(10)] * codes)
                found.append(("text and codes", lambda: {**_texts(model, known, 12), "decoder_input_ids": each}))
        found.append(("text and more", lambda: {**_texts(model, known, 12), **_beside(config, known, 12)}))
    elif "pixel_values" in known:
        found += [("image", partial(_named, "pixel_values", ROWS, channels, *s)) for s in (size, (64, 64), (224, 224))]
        films = _whole(setting(config, "num_frames"), 4)
        found.append(("film", lambda: {"pixel_values": _random(ROWS, films, channels, *size)}))
        found.append(("patches", lambda: _patches(known, channels, patch)))
        for name in ("grid_thw", "image_grid_thw"):
            if name in known:
                found += [("grid", partial(dict, {name: grid}, pixel_values=v)) for v in (flat, still)]
                found.append(("squares", partial(dict, {name: grid}, pixel_values=squares)))
        found.append(("pairs", partial(_named, "pixel_values", ROWS, 2, channels, *size)))
    if "pixel_values_videos" in known:
        films = _whole(setting(config, "frames_per_clip", "num_frames"), 4)
        found.append(("film", lambda: {"pixel_values_videos": _random(ROWS, films, channels, *size)}))
    found += _sounds(config, known)
    if "inputs_embeds" in known and "input_ids" not in known:
        width = _whole(setting(config, "hidden_size", "d_model"), 32)
        found.append(("embeddings", lambda: {"inputs_embeds": _random(ROWS, 12, width)}))
    if "hidden_states" in known:
        width = _whole(setting(config, "hidden_size", "d_model", "embed_dim"), 32)
        found += [("patches in a row", partial(dict, hidden_states=v, grid_thw=grid)) for v in (flat, still)]
        found.append(("hidden states", lambda: {"hidden_states": _random(ROWS, 12, width)}))
    if "past_values" in known:
        length, many = _whole(setting(config, "context_length"), 32), _whole(setting(config, "num_input_channels"), 1)
        found.append(("series", lambda: {"past_values": _random(ROWS, length, many)}))
        if "past_time_features" in known:
            found.append(("series with times", partial(_series, config, length)))
    return found


def _apart(model: Any, known: Any, images: Batch) -> Batch:
    """Texts beside images, which are read across."""
    batch = {**_texts(model, known, 12), **images}
    if "image_attention_mask" in known:
        batch["image_attention_mask"] = torch.ones(ROWS, 12, 1).long()
    if "image_embeds_position_mask" in known:
        places = _whole(setting(model.config, "latent_query_num"), 4)
        batch["image_embeds_position_mask"] = torch.arange(12).expand(ROWS, -1).lt(places).long()
    return batch


def _beside(config: Any, known: Any, tokens: int) -> Batch:
    """What some models want beside texts: places on a page, parts of an image, how long and loud words are."""
    bins, seen = (
        _whole(setting(config, "num_mel_bins", "feature_size"), 16),
        _whole(setting(config, "visual_feat_dim"), 2048),
    )
    every: Batch = {
        "bbox": torch.rand(ROWS, tokens, 4, generator=torch.Generator().manual_seed(1)),
        "mm_token_type_ids": torch.zeros(ROWS, tokens).long(),
        "visual_feats": _random(ROWS, 4, seen),
        "visual_pos": torch.rand(ROWS, 4, 4),
        "duration_labels": torch.ones(ROWS, tokens).long(),
        "pitch_labels": _random(ROWS, tokens, 1),
        "energy_labels": _random(ROWS, tokens, 1),
        "spectrogram_labels": _random(ROWS, tokens, bins),
        "input_features": _random(ROWS, bins, 64),
    }
    return {name: value for name, value in every.items() if name in known}


def _series(config: Any, length: int) -> Batch:
    """A past, a future, and the time of each."""
    past = length + max(config.lags_sequence)
    return {
        "past_values": _random(ROWS, past),
        "past_time_features": _random(ROWS, past, config.num_time_features),
        "past_observed_mask": torch.ones(ROWS, past),
        "future_values": _random(ROWS, config.prediction_length),
        "future_time_features": _random(ROWS, config.prediction_length, config.num_time_features),
    }


def _whole(value: Any, default: int) -> int:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, int) and value > 0 else default


def _texts(model: Any, known: Any, tokens: int) -> Batch:
    """Padded, as batches are."""
    ids = _ids(tokens)
    batch: Batch = {"input_ids": ids}
    if "qformer_input_ids" in known:
        batch["qformer_input_ids"] = _ids(tokens)
    if "attention_mask" in known or any(p.kind == p.VAR_KEYWORD for p in known.values()):
        batch["attention_mask"] = mask = torch.ones_like(ids)
        mask[-1, tokens - 3 :] = 0
        ids[-1, tokens - 3 :] = 0
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in known:
        batch["decoder_input_ids"] = _ids(tokens - 2)
    return batch


def _patches(known: Any, channels: int, patch: int) -> Batch:
    batch: Batch = {"pixel_values": _random(ROWS, 16, channels * patch * patch)}
    if "spatial_shapes" in known:
        batch |= {"spatial_shapes": torch.tensor([[4, 4]] * ROWS), "pixel_attention_mask": torch.ones(ROWS, 16).long()}
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
    for name in ("image_position_ids", "pixel_position_ids"):
        if name in known:
            batch[name] = places.expand(ROWS, -1, -1).contiguous()
    return batch


_SOUND_MASKS = {"input_features_mask": torch.bool, "feature_attention_mask": torch.long}


def _sounds(config: Any, known: Any) -> list[tuple[str, Callable[[], Batch]]]:
    bins = _whole(
        setting(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "n_mels"), 16
    )
    source = _whole(setting(config, "max_source_positions"), 64)
    words: Batch = {"decoder_input_ids": _ids(8)} if "decoder_input_ids" in known else {}
    found: list[tuple[str, Callable[[], Batch]]] = []
    if "input_values" in known:
        length = _whole(setting(config, "max_length"), 64)
        for shape in ((ROWS, 4000), (ROWS, length, bins), (ROWS, 1, 4000)):
            found.append(("sound", partial(_named, "input_values", *shape)))
        found.append(("sound and text", lambda: {"input_values": _random(ROWS, 4000), **words}))
        spoken = _random(ROWS, 8, bins)
        found.append(("sounds", lambda: {"input_values": _random(ROWS, 4000), "decoder_input_values": spoken}))
    if "input_features" in known:
        for shape in ((ROWS, bins, 2 * source), (ROWS, 64, bins)):
            masks = {
                name: torch.ones(ROWS, shape[-1] if shape[-1] != bins else shape[1]).to(kind)
                for name, kind in _SOUND_MASKS.items()
                if name in known
            }
            found.append(("spectrogram", partial(_with, words, "input_features", *shape)))
            if masks:
                found.append(("spectrogram and mask", partial(_with, {**words, **masks}, "input_features", *shape)))
    return found


_IMAGE_TOKENS = ("image_token_id", "image_token_index", "img_token_id", "image_patch_id", "img_patch_id")


def with_images(model: Any, known: Any, images: Batch) -> Batch:
    """Texts in which as many places are held for the images as the model makes features of them."""
    token = next((id_ for name in _IMAGE_TOKENS if (id_ := getattr(model.config, name, None)) is not None), None)
    get = getattr(model, "get_image_features", None) or getattr(
        getattr(model, "model", None), "get_image_features", None
    )
    if token is None or get is None:
        raise NoBatch("no place for images in texts")
    takes = inspect.signature(get).parameters
    anything = any(parameter.kind == parameter.VAR_KEYWORD for parameter in takes.values())
    with torch.no_grad():
        features = get(**{name: value for name, value in images.items() if name in takes or anything})
    each, odd = divmod(_rows_of(features), ROWS)
    if odd or each > 1000:
        raise NoBatch(f"{each} places for an image")
    batch = _texts(model, known, 12)
    ids = batch["input_ids"]
    batch["input_ids"] = torch.cat([ids[:, :2], torch.full((ROWS, each), token), ids[:, 2:]], 1)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.cat([torch.ones(ROWS, each).long(), batch["attention_mask"]], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in known:
            batch[name] = (batch["input_ids"] == token).long()
    return {**batch, **images}


def _rows_of(features: Any) -> int:
    """How many places image features fill, of all rows together."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            features = getattr(features, name)
            break
    if isinstance(features, list | tuple):
        if len(features) == 2 and isinstance(features[1], list | tuple):
            return _rows_of(features[0])
        return sum(tensor.shape[:-1].numel() for tensor in features)
    return int(features.shape[:-1].numel())
