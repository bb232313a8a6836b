"""Models of sentence-transformers whose transformer is patched: saved and loaded as a whole."""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.modules import Transformer
from torch import nn

from ..checkpoint.auto import fetch_adapter, label_options, resize_as_saved
from ..checkpoint.load import load_adapter, read_description
from ..errors import AdapterFileError

_OF_THE_ADAPTER = ("revision", "subfolder")
"""Arguments that say where the adapter is, and nothing of its base model."""


class MeftTransformer(Transformer):
    """sentence-transformers' first module, with a transformer that is patched.

    It saves the adapter and not the backbone, and loads the base model that the adapter names and the adapter into it:
    ``SentenceTransformer(folder, trust_remote_code=True)``, for sentence-transformers imports no module of another
    package without being told that it may. Its trainers load their checkpoints as they are.
    """

    def __init__(self, model_name_or_path: str, **settings: Any) -> None:
        options = dict(settings.pop("model_kwargs", None) or {})
        config = dict(settings.pop("config_kwargs", None) or {})
        hub = {name: options[name] for name in ("cache_dir", "local_files_only", "token") if name in options}
        folder = fetch_adapter(model_name_or_path, options.get("revision"), hub) / options.get("subfolder", "")
        description = read_description(folder)
        base = description["base_model_name_or_path"]
        if not base:
            raise AdapterFileError(
                f"the adapter in {folder} does not name its base model: load that with sentence-transformers, and call "
                "meft_kernels.load_adapter(model, folder)"
            )
        labels = label_options(description)
        super().__init__(
            base,
            model_kwargs={name: value for name, value in options.items() if name not in _OF_THE_ADAPTER},
            config_kwargs={
                **labels,
                **({"num_labels": len(labels["id2label"])} if labels else {}),
                **{name: value for name, value in config.items() if name not in _OF_THE_ADAPTER},
            },
            tokenizer_name_or_path=model_name_or_path,
            **settings,
        )
        resize_as_saved(self.model, description, folder)
        load_adapter(self.model, folder)


class EncoderBinding:
    """Has the module around a patched transformer save and load it as one."""

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        around = (part for part in model.modules() if type(part) is Transformer and part.model is base)
        self._module: nn.Module | None = next(around, None)
        if self._module is not None:
            self._module.__class__ = MeftTransformer

    def remove(self, model: nn.Module) -> None:
        """Give the module its own class back."""
        if self._module is not None:
            self._module.__class__ = Transformer
