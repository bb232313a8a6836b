"""A tiny random model of every family in the registry, and of those that once had a file: all are in every test."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import nn

from meft_kernels import supported_model_types

from .written import FOUND

VOCABULARY = 97
LABELS = 3

# Every size that a config may have; each family takes those that its own config knows.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # the MLP, by every name it has
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "ffn_dim": 64,
    "d_ff": 64,
    "hidden_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    # decoders beside an encoder
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "num_decoder_layers": 3,
    # what else would be too large, or not show at this size
    "embedding_size": 16,
    "word_embed_proj_dim": 32,
    "pooler_hidden_size": 32,
    "pooler_output_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "local_attention": 4,
    "no_rope_layer_interval": 2,
    "original_max_position_embeddings": 64,
    "image_size": 8,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": LABELS,
}


@dataclass(frozen=True)
class Entry:
    """A family, or a way of building it that its code treats differently."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)


_VARIATIONS = {
    "bert-decoder": Entry("bert", {"is_decoder": True}),
    "bert-chunked": Entry("bert", {"chunk_size_feed_forward": 1}),
    "distilbert-chunked": Entry("distilbert", {"chunk_size_feed_forward": 1}),
    "deberta-v2-relative": Entry(
        "deberta-v2",
        {
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
    ),
    "opt-post-norm": Entry("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-layerdrop": Entry("opt", {"layerdrop": 0.4, "num_hidden_layers": 5}),
    "bart-layerdrop": Entry("bart", {"encoder_layerdrop": 0.4, "decoder_layerdrop": 0.4}),
    "gpt_neox-sequential": Entry("gpt_neox", {"use_parallel_residual": False}),
    "t5-gated": Entry("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "qwen3_moe-dense-layer": Entry("qwen3_moe", {"mlp_only_layers": [1]}),
}
ZOO: dict[str, Entry] = {name: Entry(name) for name in sorted((*supported_model_types(), *FOUND))} | _VARIATIONS


def skip_reason(name: str, variant: str) -> str | None:
    """Why a family cannot be patched as a variant; a test holds the error to it."""
    entry = ZOO[name]
    if entry.model_type == "gpt_neox" and variant == "meft3" and entry.settings.get("use_parallel_residual", True):
        return "could not be taken apart"  # its MLP reads the layer's input beside attention
    return None


def tiny_config(name: str, *, dropout: float | None = 0.0, **overrides: Any) -> Any:
    """The family's own config, small. ``dropout`` sets every rate that it has; None leaves its defaults."""
    entry = ZOO[name]
    known, rates = _knows(entry.model_type)
    settings = {key: value for key, value in _SMALL.items() if key in known}
    if dropout is not None:
        settings |= dict.fromkeys(rates, dropout)
    return transformers.CONFIG_MAPPING[entry.model_type](**{**settings, **entry.settings, **overrides})


@cache
def _knows(model_type: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """What a family's config takes, and which of it are dropout rates."""
    default = transformers.CONFIG_MAPPING[model_type]()
    values = default.to_dict()
    rates = [
        key
        for key, value in values.items()
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float)
    ]
    return frozenset({"num_labels", "decoder_start_token_id", *values, *default.attribute_map}), tuple(rates)


def heads(model_type: str) -> list[type[nn.Module]]:
    """Every class that transformers has for a family: the base model, encoders alone, and all task heads."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    module = import_module(f"transformers.models.{config_class.__module__.split('.')[-2]}")
    found = []
    for attribute in dir(module):
        candidate = getattr(module, attribute, None)
        if (
            inspect.isclass(candidate)
            and issubclass(candidate, transformers.PreTrainedModel)
            and candidate.config_class is config_class
            and "pretrained" not in attribute.lower()
        ):
            found.append(candidate)
    return found


def main_head(name: str) -> type[nn.Module]:
    """The class that most people fine-tune."""
    entry = ZOO[name]
    auto = transformers
    config_class = transformers.CONFIG_MAPPING[entry.model_type]
    order: tuple[Any, ...] = (auto.AutoModelForCausalLM, auto.AutoModelForImageClassification)
    if config_class in auto.AutoModelForSeq2SeqLM._model_mapping:
        order = (auto.AutoModelForSeq2SeqLM,)
    elif config_class in auto.AutoModelForMaskedLM._model_mapping and not entry.settings.get("is_decoder"):
        order = (auto.AutoModelForSequenceClassification,)
    mapping = next(mapping for mapping in order if config_class in mapping._model_mapping)
    chosen = mapping._model_mapping[config_class]
    return chosen[0] if isinstance(chosen, tuple) else chosen


_MADE: OrderedDict[tuple[Any, ...], tuple[Any, torch.Tensor]] = OrderedDict()
"""The last models made, never run or patched, and where each left torch's generator: a test asks for one up to seven
times, and a copy takes a third of the time.
"""


def tiny(name: str, head: type[nn.Module] | None = None, *, dropout: float | None = 0.0, **overrides: Any) -> Any:
    """A model with weights of a size at which every part of it matters; a new one, the same each time."""
    head = head or main_head(name)
    if head.__name__.endswith("QuestionAnswering"):
        overrides = {"num_labels": 2, **overrides}  # where an answer starts and where it ends
    key = (name, head, dropout, repr(sorted(overrides.items())))
    if key not in _MADE:
        torch.manual_seed(0)
        _MADE[key] = _make(head, tiny_config(name, dropout=dropout, **overrides)), torch.get_rng_state()
        if len(_MADE) > 4:
            _MADE.popitem(last=False)
    model, state = _MADE[key]
    torch.manual_seed(0)  # other devices' generators too
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def _make(head: type[nn.Module], config: Any) -> Any:
    model = head(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
            elif key.endswith("bias"):
                nn.init.normal_(parameter, std=0.05)
    return model.eval()


def batch_for(model: Any, rows: int = 2, tokens: int = 7, seed: int = 1, *, labels: bool = True) -> dict[str, Any]:
    """Keyword arguments of the model's forward: padded texts of odd length, or images; with labels if it takes them."""
    generator = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(model.forward).parameters
    if model.main_input_name == "pixel_values":
        batch: dict[str, Any] = {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
        if "labels" in parameters and labels:
            batch["labels"] = torch.randint(0, LABELS, (rows,), generator=generator)
        return batch
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, tokens // 2 + 1 :] = 0
        ids = ids.masked_fill(mask == 0, 0)
    ids[torch.arange(rows), mask.sum(1) - 1] = 2  # some classifiers read the hidden state of the end-of-text token
    if type(model).__name__.endswith("MultipleChoice"):
        ids, mask = (tensor.unsqueeze(1).expand(-1, 2, -1).contiguous() for tensor in (ids, mask))
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, tokens - 2), generator=generator)
    if not labels or "labels" not in parameters:
        return batch
    kind = type(model).__name__
    if "SequenceClassification" in kind:
        batch["labels"] = torch.randint(0, LABELS, (rows,), generator=generator)
        batch.pop("decoder_input_ids", None)
    elif "decoder_input_ids" in batch:
        batch["labels"] = torch.randint(3, VOCABULARY, (rows, tokens - 2), generator=generator)
        del batch["decoder_input_ids"]
    elif any(part in kind for part in ("CausalLM", "LMHead", "MaskedLM")):
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch


def loss_of(output: Any) -> torch.Tensor:
    """The model's own loss; without labels, something that every float output takes part in."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    values = [value for value in output.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    # Not their squares, to which a final norm is blind.
    return sum((value.float() * torch.randn(value.shape, generator=generator)).mean() for value in values)
