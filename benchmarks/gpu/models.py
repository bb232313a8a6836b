"""Models of real shapes with random weights, and batches for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from meft_kernels.estimate.shapes import BUILT_IN

_TINY = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_OF = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
}
FIRST_TOKEN = 3
"""Smaller ids are padding in some of the families, which RoBERTa counts positions by."""


def config_of(name: str, *, tiny: bool) -> Any:
    """A model's config, or one of the same family that is no model of its size."""
    _, family, settings = BUILT_IN[name]
    small = {**_TINY, **_TINY_OF.get(family, {"intermediate_size": 64})} if tiny else {}
    return transformers.CONFIG_MAPPING[family](**{**settings, **small})


def build(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> Any:
    """The model in train mode, its random weights made where they stay."""
    torch.manual_seed(0)
    config = config_of(name, tiny=tiny)
    causal = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    with device:
        made = causal[not is_causal(name)].from_config(config, dtype=dtype, attn_implementation="sdpa")
    made.config.use_cache = False  # some families would make a cache in training
    return made.train()


def is_causal(name: str) -> bool:
    """Whether the task is the next token; the others classify."""
    return "CausalLM" in BUILT_IN[name][2]["architectures"][0]


def batch_of(model: Any, rows: int, tokens: int, *, loss_on: int | None = None) -> dict[str, Any]:
    """Random tokens without padding. ``loss_on``: the loss of a causal model is on that many last tokens."""
    device = next(model.parameters()).device
    torch.manual_seed(1)
    ids = torch.randint(FIRST_TOKEN, model.config.vocab_size, (rows, tokens), device=device)
    if model.get_output_embeddings() is None:
        return {"input_ids": ids, "labels": torch.arange(rows, device=device) % 2}
    if loss_on is None:
        return {"input_ids": ids, "labels": ids.clone()}
    return {"input_ids": ids, "labels": ids[:, -loss_on:].clone(), "logits_to_keep": loss_on}


def twin(base: nn.Module) -> nn.Module:
    """A copy of the modules around the very same weights. Whoever trains it takes what it trains by :func:`own`."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in base.parameters()}
    return copy.deepcopy(base, shared)


def own(model: nn.Module, base: nn.Module) -> None:
    """Give every trained parameter memory of its own, in the base's dtype."""
    dtype = next(base.parameters()).dtype
    shared = {p.untyped_storage().data_ptr() for p in base.parameters()}
    for parameter in trained(model):
        mine = parameter.untyped_storage().data_ptr() not in shared
        parameter.data = parameter.detach().to(dtype) if mine else parameter.detach().clone()


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """What an optimiser gets."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
