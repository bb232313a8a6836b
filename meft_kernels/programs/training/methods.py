"""What a run trains and what it leaves: adapters of MEFT, or a LoRA of PEFT's inside of reversible layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from transformers.utils import SAFE_WEIGHTS_NAME

from ...checkpoint.card import auto_class_for
from ...checkpoint.files import WEIGHTS_NAME
from ...checkpoint.load import load_adapter
from ...checkpoint.save import save_adapter
from ...packages import TRAIN_EXTRA, require
from ...patching.patch import patch, unpatch
from ...pretrained import Pretrained
from ..using.folder import CLASSES
from .settings import Settings

ADAPTER, MERGED = "adapter", "merged"


class Method(Protocol):
    """What of a run depends on it."""

    checkpoint_files: tuple[str, ...]
    """Weights in a whole checkpoint, all of them safetensors."""
    leaves: tuple[str, ...]
    """Folders that are written."""

    def prepare(self, model: Any) -> Any:
        """The model as it is trained."""

    def load(self, model: Any, checkpoint: Path) -> None:
        """Take a checkpoint's weights."""

    def finish(self, model: Any) -> bool:
        """Make of the model what is saved; whether it then computes something else than it did in training."""

    def save(self, model: Any, tokenizer: Any, out: Path) -> None:
        """Write it, and the tokenizer beside it."""

    def merge(self, model: Any, tokenizer: Any, out: Path) -> None:
        """Write the merged model, where that was asked for; the last thing that is done with the model."""

    def uses(self, out: Path) -> list[str]:
        """How to load what was written, in Python."""


def method_for(settings: Settings, pretrained: Pretrained) -> Method:
    """The one that the settings name."""
    return Lora(settings, pretrained) if settings.method == "lora" else Meft(settings, pretrained)


class Meft:
    """Our own adapters, which need this library to be used."""

    checkpoint_files: tuple[str, ...] = (WEIGHTS_NAME, SAFE_WEIGHTS_NAME)
    leaves: tuple[str, ...] = (ADAPTER,)

    def __init__(self, settings: Settings, pretrained: Pretrained) -> None:
        self._settings = settings
        self._pretrained = pretrained
        self._auto_class = ""
        self._new_head = False

    def prepare(self, model: Any) -> Any:
        classes = getattr(model.config, "num_labels", 0)
        self._new_head = self._settings.task == "classification" and self._pretrained.config.num_labels != classes
        self._auto_class = auto_class_for(type(model).__name__)
        return patch(model, self._settings.meft)

    def load(self, model: Any, checkpoint: Path) -> None:
        load_adapter(model, checkpoint)

    def finish(self, model: Any) -> bool:
        return False

    def save(self, model: Any, tokenizer: Any, out: Path) -> None:
        tokenizer.save_pretrained(out / ADAPTER)  # before the adapter, whose config comes last
        save_adapter(model, out / ADAPTER)

    def merge(self, model: Any, tokenizer: Any, out: Path) -> None:
        pass

    def uses(self, out: Path) -> list[str]:
        given = ", ignore_mismatched_sizes=True" if self._new_head else ""  # the base model may have a head, too
        return [f'meft_kernels.{self._auto_class}.from_pretrained("{out / ADAPTER}"{given})']


class Lora:
    """PEFT's, which is trained here and needs nothing of ours to be used."""

    checkpoint_files: tuple[str, ...] = (WEIGHTS_NAME,)

    def __init__(self, settings: Settings, pretrained: Pretrained) -> None:
        self._settings = settings
        self._pretrained = pretrained
        self._kind = "CausalLM" if settings.task == "causal-lm" else "SequenceClassification"
        self._classes = 0
        self.leaves: tuple[str, ...] = (ADAPTER, MERGED) if settings.merge else (ADAPTER,)

    def prepare(self, model: Any) -> Any:
        """Wrapped by PEFT, and reversible.

        Raises:
            ValueError: PEFT refuses the settings.
        """
        peft = require("peft", TRAIN_EXTRA)
        task = "CAUSAL_LM" if self._kind == "CausalLM" else "SEQ_CLS"  # with the latter PEFT trains and saves the head
        self._classes = getattr(model.config, "num_labels", 0)
        try:
            made = peft.get_peft_model(model, peft.LoraConfig(task_type=task, **self._settings.lora))
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"lora: {error}") from None
        return patch(made, self._settings.meft)

    def load(self, model: Any, checkpoint: Path) -> None:
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)

    def finish(self, model: Any) -> bool:
        unpatch(model)
        return True

    def save(self, model: Any, tokenizer: Any, out: Path) -> None:
        tokenizer.save_pretrained(out / ADAPTER)
        model.save_pretrained(str(out / ADAPTER))
        if self._kind != "CausalLM":  # PEFT's files do not say what the classes are called
            names = [model.config.id2label[index] for index in range(self._classes)]
            text = json.dumps(names, ensure_ascii=False) + "\n"
            (out / ADAPTER / CLASSES).write_text(text, encoding="utf-8")

    def merge(self, model: Any, tokenizer: Any, out: Path) -> None:
        if self._settings.merge:
            merged = model.merge_and_unload()
            tokenizer.save_pretrained(out / MERGED)
            merged.save_pretrained(out / MERGED)

    def uses(self, out: Path) -> list[str]:
        source, config = self._pretrained.source, self._pretrained.config
        options = {name: repr(value) for name, value in source.options().items()}
        if "quantization_config" in source.model_options():
            options["quantization_config"] = "transformers.GgufConfig(dequantize=True)"
        if self._kind != "CausalLM":
            options["num_labels"] = str(self._classes)
            if config.num_labels != self._classes:  # its own head, if it has one
                options["ignore_mismatched_sizes"] = "True"
        given = "".join(f", {name}={value}" for name, value in options.items())
        made = [f'peft.AutoPeftModelFor{self._kind}.from_pretrained("{out / ADAPTER}"{given})']
        if self._settings.merge:
            made.append(f'transformers.AutoModelFor{self._kind}.from_pretrained("{out / MERGED}")')
        return made
