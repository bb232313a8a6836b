"""A trained folder's model and tokenizer."""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers

from ...checkpoint.auto import AutoMeftModel
from ...errors import MeftError
from ...packages import TRAIN_EXTRA, require
from ...pretrained import Source, gguf_source
from .folder import CLASSES, Trained


def load(trained: Trained, device: torch.device) -> tuple[Any, Any]:
    """The model in eval mode on the device, in the dtype that it was trained in, and its tokenizer.

    Raises:
        ValueError: the base model or something of the folder cannot be loaded.
        MissingPackageError: it is a LoRA, and PEFT is not installed.
    """
    try:
        model = _model(trained)
        tokenizer = _tokenizer(trained)
    except (OSError, ValueError, MeftError) as error:
        raise ValueError(f"{trained.folder} cannot be loaded: {error}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # by which a classifier finds where a text ends
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def longest(trained: Trained, model: Any, asked: int | None = None) -> int:
    """Tokens of a text: as asked for, or as the run had it, or all that the model has positions for.

    Raises:
        ValueError: more than there are positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = asked or trained.of_data("max_length") or positions or 512
    if positions and tokens > positions:
        raise ValueError(f"--max-length is {tokens}, and this model has {positions} positions")
    return int(tokens)


def _model(trained: Trained) -> Any:
    dtype = trained.settings.get("dtype", "auto")
    if trained.kind == "meft":
        # As the class that it was trained as, whichever that is; a head of other classes was begun anew, and is in it.
        new_head: dict[str, Any] = {"ignore_mismatched_sizes": True} if trained.task == "classification" else {}
        return AutoMeftModel.from_pretrained(trained.folder, base_model=trained.base, dtype=dtype, **new_head)
    kind = "SequenceClassification" if trained.task == "classification" else "CausalLM"
    auto_class = getattr(transformers, f"AutoModelFor{kind}")
    if trained.kind == "whole":
        return auto_class.from_pretrained(trained.folder, dtype=dtype)
    peft = require("peft", TRAIN_EXTRA)
    options = _base(trained).model_options()
    if trained.task == "classification":
        names = _classes(trained)
        options |= {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "ignore_mismatched_sizes": True,
        }
    base = auto_class.from_pretrained(_base(trained).path, dtype=dtype, **options)
    return peft.PeftModel.from_pretrained(base, str(trained.folder))


def _tokenizer(trained: Trained) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(trained.folder)
    except (OSError, ValueError):
        if trained.kind == "whole":
            raise
        base = _base(trained)  # an adapter that was saved without one
        return transformers.AutoTokenizer.from_pretrained(base.path, **base.options())


def _base(trained: Trained) -> Source:
    return gguf_source(trained.base) or Source(trained.base)


def _classes(trained: Trained) -> list[str]:
    path = trained.folder / CLASSES
    if not path.is_file():
        raise ValueError(
            f"it does not name its classes: write {CLASSES} into it, a JSON list of their names in the labels' order"
        )
    return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]
