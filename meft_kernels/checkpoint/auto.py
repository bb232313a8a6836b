"""``AutoMeftModel`` and its siblings: a fine-tuned model from its adapter's folder alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import AdapterFileError
from ..pretrained import gguf_source
from .files import CONFIG_NAME, WEIGHTS_NAME, read_shapes
from .load import load_adapter, read_description
from .vocabulary import embedding_rows, vocabulary_tensors

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
"""Arguments of ``from_pretrained`` that the adapter's download takes as well as the base model's."""


class AutoMeftModel:
    """Loads the base model that an adapter names, as the class it was trained as, and the adapter into it.

    The siblings (``AutoMeftModelForCausalLM`` and so on) load it through transformers' auto class of the same task.
    """

    # By name: importing transformers' auto classes takes two seconds, which `import meft_kernels` need not.
    _auto_class: ClassVar[str | None] = None

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not constructed: use {type(self).__name__}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | os.PathLike[str],
        *,
        base_model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        probe: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The patched model with its adapter, in eval mode.

        Where the adapter brings the rows of a vocabulary that was resized, the base model's is resized as well.

        Args:
            adapter: a folder written by ``save_adapter``, a ``Trainer``'s checkpoint of a patched model, or a hub id.
            base_model: hub id or folder of the base model, where it is no longer the one that the adapter names. A
                folder with a single GGUF file is loaded from that, dequantised.
            revision: of the adapter on the hub. That of the base model goes into ``base_model_revision``.
            probe: a batch to look at a model without a family file with, as for ``load_adapter``.
            **kwargs: for the base model's ``from_pretrained``: ``dtype``, ``device_map``, ``quantization_config``, ...

        Returns:
            The transformers model, patched; train on, ``generate``, ``save_adapter``.

        Raises:
            AdapterFileError: no such adapter, a damaged one, or one that does not say what it belongs to.
            OSError: the base model is not found (from transformers).
        """
        folder = fetch_adapter(adapter, revision, {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs})
        description = read_description(folder)
        source = os.fspath(base_model) if base_model is not None else description["base_model_name_or_path"]
        if not source:
            raise AdapterFileError(
                f"{folder / CONFIG_NAME} does not name the base model: pass base_model=, or load it yourself and call "
                "meft_kernels.load_adapter(model, folder)"
            )
        kwargs = {**label_options(description), **kwargs}
        if "base_model_revision" in kwargs:
            kwargs["revision"] = kwargs.pop("base_model_revision")
        if cls._auto_class is not None:
            model_class = getattr(transformers, cls._auto_class)
        else:
            model_class = _class_named(description["base_model_class"], folder)
        gguf = gguf_source(source)
        options = gguf.model_options() if gguf is not None else {}
        try:
            model = model_class.from_pretrained(source, **{**options, **kwargs})
        except OSError as error:
            if base_model is not None:
                raise
            raise OSError(
                f"the base model {source!r}, which {folder / CONFIG_NAME} names, is not found: if it is somewhere "
                f"else, pass base_model= ({error})"
            ) from error
        resize_as_saved(model, description, folder)
        return load_adapter(model, folder, probe=probe)


class AutoMeftModelForCausalLM(AutoMeftModel):
    """:class:`AutoMeftModel` through ``AutoModelForCausalLM``."""

    _auto_class = "AutoModelForCausalLM"


class AutoMeftModelForSeq2SeqLM(AutoMeftModel):
    """:class:`AutoMeftModel` through ``AutoModelForSeq2SeqLM``."""

    _auto_class = "AutoModelForSeq2SeqLM"


class AutoMeftModelForSequenceClassification(AutoMeftModel):
    """:class:`AutoMeftModel` through ``AutoModelForSequenceClassification``."""

    _auto_class = "AutoModelForSequenceClassification"


class AutoMeftModelForTokenClassification(AutoMeftModel):
    """:class:`AutoMeftModel` through ``AutoModelForTokenClassification``."""

    _auto_class = "AutoModelForTokenClassification"


class AutoMeftModelForQuestionAnswering(AutoMeftModel):
    """:class:`AutoMeftModel` through ``AutoModelForQuestionAnswering``."""

    _auto_class = "AutoModelForQuestionAnswering"


def fetch_adapter(adapter: str | os.PathLike[str], revision: str | None, options: dict[str, Any]) -> Path:
    """The folder of an adapter that is on this machine or on the hub.

    Raises:
        AdapterFileError: it is nowhere.
    """
    folder = Path(adapter)
    if folder.is_dir():
        return folder
    name = os.fspath(adapter)
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **options
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(f"there is no folder {name!r}, and as a hub id it was not found: {error}") from error
    return Path(found)


def label_options(description: dict[str, Any]) -> dict[str, Any]:
    """What a classifier's config must be given to have the classes that the adapter was trained for."""
    labels = description.get("labels")
    if labels is None:
        return {}
    names = {int(index): name for index, name in labels["id2label"].items()}
    options = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    return options if labels.get("problem_type") is None else {**options, "problem_type": labels["problem_type"]}


def resize_as_saved(model: Any, description: dict[str, Any], folder: Path) -> None:
    """Give the base model as many tokens as the adapter was trained with, where the adapter brings their rows."""
    rows, saved = embedding_rows(model), description.get("vocab_size")
    if rows is None or not isinstance(saved, int) or saved == rows:
        return
    if vocabulary_tensors(model, rows).keys() & read_shapes(folder / WEIGHTS_NAME).keys():
        model.resize_token_embeddings(saved, mean_resizing=False)


def _class_named(name: str, folder: Path) -> Any:
    """A model class of transformers; never anything else that the file may name."""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} names the model class {name!r}, which transformers {transformers.__version__} "
            "does not have: load the base model yourself and call meft_kernels.load_adapter(model, folder)"
        )
    return found
