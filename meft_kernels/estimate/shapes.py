"""Configs by name, without weights: the hub's, a folder's, a package's, and a few that are built in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import transformers

from ..pretrained import NAMES, find_model

_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# From their public config.json, so that they are known without network and without the licence that some ask for.
BUILT_IN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base": ("google-bert/bert-base-uncased", "bert", {"architectures": ["BertForMaskedLM"]}),
    "roberta-large": (
        "FacebookAI/roberta-large",
        "roberta",
        {
            "architectures": ["RobertaForMaskedLM"],
            "vocab_size": 50265,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
    ),
    "opt-1.3b": (
        "facebook/opt-1.3b",
        "opt",
        {
            "architectures": ["OPTForCausalLM"],
            "vocab_size": 50272,
            "hidden_size": 2048,
            "ffn_dim": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "word_embed_proj_dim": 2048,
            "max_position_embeddings": 2048,
        },
    ),
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        "llama",
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_parameters": {**_LLAMA_ROPE, "factor": 32.0},
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        "llama",
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_parameters": {**_LLAMA_ROPE, "factor": 8.0},
        },
    ),
    "llama-3.1-70b": (
        "meta-llama/Llama-3.1-70B",
        "llama",
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_parameters": {**_LLAMA_ROPE, "factor": 8.0},
        },
    ),
}


def find_config(name: str) -> Any:
    """The config of a folder, of a built-in shape (by its name or its hub id), of a packaged model, or from the hub.

    Raises:
        ValueError: there is none of this name.
        MissingPackageError: the package that carries the model is not installed.
    """
    if not Path(name).is_dir():
        for short, (hub_id, model_type, settings) in BUILT_IN.items():
            if name.lower() in (short, hub_id.lower()):
                return transformers.CONFIG_MAPPING[model_type](**settings)
    source = find_model(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source.path, **source.options())
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        known = ", ".join((*NAMES, *BUILT_IN))
        raise ValueError(
            f"no config for {name!r}: it is one of {known}, a folder with a config.json, or a hub id ({reason})"
        ) from None
    if source.gguf_file and not config.architectures:
        config.architectures = ["ForCausalLM"]  # files of llama.cpp hold nothing else
    return config


def with_positions(config: Any, tokens: int) -> Any:
    """The same model for texts of so many tokens, as people extend it: tables of learned positions grow."""
    limit = longest_input(config)
    if limit is None or tokens <= limit:
        return config
    config = copy.deepcopy(config)
    config.get_text_config().max_position_embeddings += tokens - limit
    return config


def longest_input(config: Any) -> int | None:
    """Tokens that the model's positions allow; None where nothing limits them."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if text.model_type in ("roberta", "xlm-roberta"):  # positions begin after the padding token's
        limit -= text.pad_token_id + 1
    return limit
