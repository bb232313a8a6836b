"""A hub on disk: tiny random models, tokenizers and data for every id that the chosen tests name.

Models lie where huggingface_hub would have put its downloads, so that whatever resolves an id finds them. Data sets are
TRL's own, collected from the script that makes them.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

REVISION = "0" * 40
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
VOCABULARY = 320
"""Bytes and what is special, and some rows that no text has."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
CAUSAL, CLASSIFIER, BARE = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "HuggingFaceTB/SmolLM-360M": (CAUSAL, "llama", GROUPED),
    "bert-base-cased": (CLASSIFIER, "bert", {}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (CAUSAL, "gemma3_text", GEMMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (CAUSAL, "mistral", GROUPED),
    "hf-internal-testing/tiny-random-gpt2": (CAUSAL, "gpt2", {}),
    "peft-internal-testing/tiny-dummy-qwen2": (CAUSAL, "qwen2", GROUPED),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (CLASSIFIER, "bert", {}),
    "peft-internal-testing/tiny-random-BertModel": (BARE, "bert", {}),
    "peft-internal-testing/tiny-random-DebertaV2Model": (BARE, "deberta-v2", {}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (CAUSAL, "gpt2", {}),
    "peft-internal-testing/tiny-random-OPTForCausalLM": (CAUSAL, "opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (CLASSIFIER, "roberta", {}),
    "peft-internal-testing/tiny-random-RobertaModel": (BARE, "roberta", {}),
    "trl-internal-testing/tiny-GPTNeoXForCausalLM": (CAUSAL, "gpt_neox", {}),
    "trl-internal-testing/tiny-Gemma2ForCausalLM": (CAUSAL, "gemma2", GEMMA),
    "trl-internal-testing/tiny-LlamaForCausalLM-3.2": (CAUSAL, "llama", GROUPED),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (CLASSIFIER, "llama", {**GROUPED, "num_labels": 1}),
    "trl-internal-testing/tiny-MistralForCausalLM-0.2": (CAUSAL, "mistral", GROUPED),
    "trl-internal-testing/tiny-Phi3ForCausalLM": (CAUSAL, "phi3", GROUPED),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": (CAUSAL, "qwen2", GROUPED),
    "trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5": (CLASSIFIER, "qwen2", {**GROUPED, "num_labels": 1}),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (CAUSAL, "qwen3", GROUPED),
    "trl-internal-testing/tiny-Qwen3ForSequenceClassification": (CLASSIFIER, "qwen3", {**GROUPED, "num_labels": 1}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (CAUSAL, "llama", GROUPED),
}
"""Id: the class that makes it, the family, and its sizes beside :data:`SIZES`."""
DATA = "trl-internal-testing/zen"
TEMPLATES = {"Qwen3": "qwen3", "Llama": "llama3_2", "Gemma2": "gemma", "Phi3": "phi3"}
"""Which of TRL's chat templates a tokenizer has, by what its id contains; Qwen2.5's otherwise."""


def build(home: Path, templates: Path | None) -> None:
    """Write all models into the cache ``home``; ``templates`` is TRL's folder of chat templates, where there is one."""
    import torch
    import transformers

    for index, (model_id, (auto_class, family, sizes)) in enumerate(MODELS.items()):
        config = transformers.AutoConfig.for_model(family, **{**SIZES, **sizes})
        torch.manual_seed(index)
        model = getattr(transformers, auto_class).from_config(config)
        with torch.no_grad():  # no bias is zero and no norm the identity: where those are lost, something differs
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folder = home / "hub" / f"models--{model_id.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        snapshot = folder / "snapshots" / REVISION
        model.save_pretrained(snapshot)
        _tokenizer(model_id, templates).save_pretrained(snapshot)


def _tokenizer(model_id: str, templates: Path | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[:3],
        model_max_length=128,
    )
    if templates is not None:
        name = next((name for part, name in TEMPLATES.items() if part in model_id), "qwen2_5")
        tokenizer.chat_template = (templates / f"{name}.jinja").read_text()
    return tokenizer


@contextmanager
def _collecting(found: dict[str, Any]) -> Iterator[None]:
    import datasets

    def collect(data: Any, _: str, config_name: str) -> None:
        found[config_name] = data

    with mock.patch.object(datasets.DatasetDict, "push_to_hub", collect):
        yield


def zen(checkout: Path) -> dict[str, Any]:
    """TRL's test data by the names of their configurations, from the script in its checkout that publishes them."""
    found: dict[str, Any] = {}
    with _collecting(found):
        runpy.run_path(str(checkout / "scripts" / "generate_zen_dataset.py"))["main"](0.1, True, DATA)
    return found


def load_zen(found: dict[str, Any], config: str, split: str | None = None, streaming: bool = False) -> Any:
    """What ``load_dataset`` gives for one configuration; ``split`` may end with a slice in rows."""
    chosen = found[config]
    if split is not None:
        name, _, rows = split.partition("[:")
        chosen = chosen[name]
        if rows:
            chosen = chosen.select(range(int(rows.removesuffix("]"))))
    if not streaming:
        return chosen
    if split is None:
        import datasets

        return datasets.IterableDatasetDict({name: part.to_iterable_dataset() for name, part in chosen.items()})
    return chosen.to_iterable_dataset()
