"""Tiny models with a tokenizer of their own, and files of rows, for the tests of ``meft-kernels train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .models import tiny_bert, tiny_llama

WORDS = ["good", "bad", "film", "plot", "fine", "dull", "very", "not", "so"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A word is a token; 97 of them, the vocabulary of the tiny models. BERT's adds [CLS] and [SEP]."""
    words = [*_SPECIAL, *WORDS, "user", "assistant", "hello"]
    words += [f"w{index}" for index in range(97 - len(words))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"unk_token": "[UNK]"}
    if kind == "bert":
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        special |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        special |= {"eos_token": "</s>"}  # and no padding token, as many have none
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def save_models(folder: Path, attention_dropout: float = 0.1) -> None:
    """``bert`` (dropout 0.1, as BERT has it) and ``llama`` (with attention dropout), two layers each."""
    bert, llama = tiny_bert(layers=2), tiny_llama(layers=2, attention_dropout=attention_dropout, pad_token_id=None)
    for name, model in (("bert", bert), ("llama", llama)):
        model.save_pretrained(folder / name)
        made = tokenizer(name)
        if name == "llama":
            made.chat_template = CHAT
        made.save_pretrained(folder / name)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line, which is YAML, too, if there is one."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
