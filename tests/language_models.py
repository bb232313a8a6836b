"""Tiny random language models of every kind of head, each with a batch that has labels."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from .models import VOCABULARY

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 2}

# Class, and what its config is made of beside the sizes above.
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "llama, tied": ("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    # caps so low that they bend what such small models give
    "gemma2": ("Gemma2ForCausalLM", {**_LLAMA, "head_dim": 8, "final_logit_softcapping": 0.1}),
    "granite": ("GraniteForCausalLM", {**_LLAMA, "logits_scaling": 0.25}),
    "cohere": ("CohereForCausalLM", {**_LLAMA, "logit_scale": 3.0}),
    "gpt2": ("GPT2LMHeadModel", {**_SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt2 with a second head": (
        "GPT2DoubleHeadsModel",
        {**_SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "opt": ("OPTForCausalLM", {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
         "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0},
    ),
    "bert": ("BertForMaskedLM", _SIZES),
    "bert for pretraining": ("BertForPreTraining", _SIZES),
    "roberta": ("RobertaForMaskedLM", _SIZES),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2,
                                             "n_heads": 4}),
    "electra": ("ElectraForMaskedLM", {**_SIZES, "embedding_size": 16}),
    "deberta": ("DebertaV2ForMaskedLM", _SIZES),
    "modernbert": ("ModernBertForMaskedLM", {**_SIZES, "cls_token_id": 1, "sep_token_id": 2}),
}  # fmt: skip


def language_model(name: str, **overrides: Any) -> Any:
    """In train mode, without dropout."""
    torch.manual_seed(0)
    kind, settings = LANGUAGE_MODELS[name]
    made: Any = getattr(transformers, kind)
    config = made.config_class(**{**settings, **overrides})
    for key in list(vars(config)):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    model = made(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases, and scores that differ
    return model.train()


def labelled(model: nn.Module, rows: int = 3, tokens: int = 21, seed: int = 1) -> dict[str, torch.Tensor]:
    """63 positions, a quarter of them without a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.25, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    kind = type(model).__name__
    if kind == "BertForPreTraining":
        batch["next_sentence_label"] = torch.arange(rows) % 2
    if kind == "GPT2DoubleHeadsModel":
        batch = {name: tensor[:, None] for name, tensor in batch.items()}
        batch["mc_token_ids"] = torch.full((rows, 1), tokens - 1)
    return batch
