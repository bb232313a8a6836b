"""Whether a model's vocabulary is that of the base model it was made from, and what of it has a row for every token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..pretrained import Source, gguf_source


def resized_vocabulary(base: Any) -> list[str]:
    """Names of the tensors with a row for every token, a tied one once, where the published model has fewer, or more.

    No names where it has as many, and where its config is neither in a folder nor in the hub's cache.
    """
    rows = embedding_rows(base)
    if rows is None:
        return []
    config = base.config
    name = getattr(config, "_name_or_path", "") or ""
    published = _published_rows(config, name) if name else None
    return [] if published in (None, rows) else list(vocabulary_tensors(base, rows))


def vocabulary_tensors(base: nn.Module, rows: int) -> dict[str, torch.Tensor]:
    """Embeddings, head, the head's bias: what is saved and has so many rows, or columns; a tied one once."""
    found = {
        id(tensor): (name, tensor)
        for name, tensor in reversed(base.state_dict(keep_vars=True).items())
        if isinstance(tensor, torch.Tensor) and rows in (*tensor.shape[:1], *tensor.shape[-1:])
    }
    return dict(reversed(found.values()))


def embedding_rows(base: Any) -> int | None:
    """How many tokens the model knows; None where it knows none."""
    try:
        weight = base.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    text = base.config.get_text_config()
    # A vision model's first convolution has a weight, too.
    return int(weight.shape[0]) if isinstance(getattr(text, "vocab_size", None), int) and weight.dim() == 2 else None


def _published_rows(config: Any, name: str) -> int | None:
    source = gguf_source(name)
    if source is not None and source.gguf_file is not None:
        return _gguf_rows(source, Path(name, source.gguf_file).stat().st_mtime_ns)
    if Path(name).is_dir() and not Path(name, "config.json").exists():
        return None
    revision = getattr(config, "_commit_hash", None) or "main"
    return _rows(lambda: type(config).from_pretrained(name, local_files_only=True, revision=revision))


@functools.lru_cache(maxsize=4)
def _gguf_rows(source: Source, changed: int) -> int | None:
    """Kept, because a tokenizer of a hundred thousand words is read on the way, for seconds."""
    return _rows(lambda: transformers.AutoConfig.from_pretrained(source.path, **source.options()))


def _rows(read: Callable[[], Any]) -> int | None:
    try:
        rows = getattr(read().get_text_config(), "vocab_size", None)
    except Exception:  # of the file's readers, the hub's cache, packages that are not installed: then it is not known
        return None
    return rows if isinstance(rows, int) else None
