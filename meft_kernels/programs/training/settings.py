"""What a run can be told: names are checked against what there is, and whatever was left open gets its default."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ...config import MeftConfig, no_setting, option
from ...packages import TRAIN_EXTRA, require
from ...patching.reversible import OF_ADAPTERS, check_no_adapters
from ...pretrained import NAMES
from .columns import COLUMNS, TASKS, Task
from .sources import REVIEW_SETS

METHODS = ("meft", "lora")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The section ``data``."""

    source: str | None = option(
        None, "imdb, rotten_tomatoes, a .csv or .jsonl file, a folder of save_to_disk, a hub id"
    )
    text: str = option(COLUMNS["text"], "name of the column with the text")
    label: str = option(COLUMNS["label"], "name of the column with the class")
    prompt: str = option(COLUMNS["prompt"], "name of the column with what comes before the completion, not trained on")
    completion: str = option(COLUMNS["completion"], "name of the column with what is to follow the prompt")
    messages: str = option(
        COLUMNS["messages"], "name of the column with conversations; the assistant's turns are trained on"
    )
    conversations: str = option(COLUMNS["conversations"], "the same in the form of ShareGPT: from and value")
    instruction: str = option(COLUMNS["instruction"], "name of the column with what is to be done, as Alpaca has it")
    input: str = option(COLUMNS["input"], "name of the column with what to do it with; it may be missing or empty")
    output: str = option(COLUMNS["output"], "name of the column with the answer, which is trained on")
    split: str = option("train", "part of the source to train on, if it has parts")
    held_out_split: str | None = option(None, "part that is held out; None: validation, or else test, if there is one")
    held_out: int | float | None = option(
        None, "texts held out: a number, or a share below 1; None: a tenth, at most 1000, or all of held_out_split"
    )
    train_texts: int | None = option(None, "texts to train on; None: all others")
    max_length: int = option(256, "tokens of a text, at most; the rest is cut off")
    packing: bool = option(False, "causal-lm: texts of a batch in one row, without padding")
    split_seed: int = option(0, "decides which texts are held out; not changed by --seed, so that runs compare")

    def __post_init__(self) -> None:
        _check_types(self, type(self), "data")
        if self.held_out is not None and not (
            self.held_out >= 1 if isinstance(self.held_out, int) else 0 < self.held_out < 1
        ):
            raise ValueError(f"data.held_out is a number of texts or a share between 0 and 1, not {self.held_out!r}")
        for name, least in (("train_texts", 1), ("max_length", 8), ("split_seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be at least {least}, got {value}")


_SECTIONS = ("data", "meft", "lora", "training")
_TOP = ("model", "task", "dtype", "method", "rank", "merge", *_SECTIONS)

# The recipe of the demo, from single runs on MiniLM (demo/methods.py has the figures). logging_steps 1 costs nothing:
# the engine asks the device for its checksums in every pass anyway. And so no average in the log spans an interruption.
_TRAINING: dict[str, Any] = {
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "seed": 0,
    "report_to": "none",
}
_BATCH_SIZES: dict[str, tuple[int, int]] = {"classification": (16, 32), "causal-lm": (8, 8)}
_ENCODER_MEFT = {"down_init_std": 0.05}
_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# SmolLM2, 70 steps of 4 x 64 tokens of reviews: the rate at which a LoRA was compared with PEFT's own training.
_LORA_TRAINING = {"learning_rate": 5e-4}
_LORA_OURS = {
    "task_type": "the task decides",
    "peft_type": "it is a LoRA",
    "base_model_name_or_path": "it is model",
    "inference_mode": "the command trains",
}

_OURS = {
    "output_dir": "it is --out",
    "resume_from_checkpoint": "it is --resume",
    "enable_jit_checkpoint": "the command saves on SIGTERM by itself",
    "save_only_model": "such a checkpoint cannot be resumed, and the adapter is saved at the end anyway",
    "disable_tqdm": "the command has a progress bar of its own",
    "do_train": "the command trains",
    "do_eval": "eval_strategy decides",
    "do_predict": "the command predicts nothing",
    "remove_unused_columns": "there are none",
    "label_names": "the task decides",
}

HARMLESS = frozenset(
    {
        "merge",
        "meft.engine",
        "meft.reversible_layers",
        *(
            f"training.{name}"
            for name in (
                "dataloader_num_workers",
                "dataloader_pin_memory",
                "log_level",
                "logging_first_step",
                "logging_steps",
                "logging_strategy",
                "per_device_eval_batch_size",
                "report_to",
                "run_name",
                "save_steps",
                "save_strategy",
                "save_total_limit",
            )
        ),
    }
)
"""What a run may be resumed with other values of: none of it changes a number that is trained."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole run. Nothing is left to be decided."""

    model: str
    task: Task
    dtype: str
    method: str
    merge: bool
    data: DataSettings
    meft: MeftConfig
    lora: dict[str, Any]
    """Of ``peft.LoraConfig``; empty where that is not the method."""
    training: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """As the YAML file has it; :func:`check_given` takes it back."""
        meft = self.meft.to_dict()
        meft |= {name: list(value) for name, value in meft.items() if isinstance(value, tuple)}
        if self.method == "lora":
            meft = {name: value for name, value in meft.items() if name not in OF_ADAPTERS}
        data = dataclasses.asdict(self.data)
        return {
            **{"model": self.model, "task": self.task, "dtype": self.dtype, "method": self.method, "merge": self.merge},
            **{"data": data, "meft": meft, "lora": dict(self.lora), "training": dict(self.training)},
        }


def check_given(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Names, sections and types of settings as they came; ``data: imdb`` is short for ``data: {source: imdb}``.

    Raises:
        ValueError: an unknown name (the message has the nearest), or a value of the wrong type.
    """
    _check_names(given, _TOP, where)
    made = dict(given)
    if isinstance(made.get("data"), str):
        made["data"] = {"source": made["data"]}
    for section in _SECTIONS:
        if (value := made.setdefault(section, {})) is None:
            made[section] = {}
        elif not isinstance(value, Mapping):
            raise ValueError(f"{where}: {section} is a section of settings, not {value!r}")
    for name, choices in (("task", TASKS), ("dtype", DTYPES), ("method", METHODS)):
        if made.get(name) is not None and made[name] not in choices:
            raise ValueError(f"{name} is one of {', '.join(choices)}, not {made[name]!r}")
    if not isinstance(made.get("model"), str | None):
        raise ValueError(f"{where}: model is a name, a folder or a hub id, not {made['model']!r}")
    if not isinstance(made.get("merge"), bool | None):
        raise ValueError(f"{where}: merge is true or false, not {made['merge']!r}")
    if made["lora"]:
        _check_lora(made["lora"], where)
    for section, cls in (
        ("data", DataSettings),
        ("meft", MeftConfig),
        ("training", transformers.TrainingArguments),
    ):
        names = [f.name for f in dataclasses.fields(cls) if section != "training" or f.name not in _OURS]
        for name in made[section]:
            if section == "training" and name in _OURS:
                raise ValueError(f"{where}: training.{name} cannot be set: {_OURS[name]}")
        _check_names(made[section], names, f"{where}, section {section}")
    _check_types(made["training"], transformers.TrainingArguments, "training")
    DataSettings(**made["data"])
    MeftConfig.from_dict(made["meft"])
    return made


def _check_lora(given: Mapping[str, Any], where: str) -> None:
    config = require("peft", TRAIN_EXTRA).LoraConfig
    for name in given:
        if name in _LORA_OURS:
            raise ValueError(f"{where}: lora.{name} cannot be set: {_LORA_OURS[name]}")
    _check_names(given, [f.name for f in dataclasses.fields(config)], f"{where}, section lora")


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over settings: later ones win, section by section."""
    made: dict[str, Any] = {section: {} for section in _SECTIONS}
    for layer in layers:
        if layer.get("rank") is not None:  # the method's, which another layer may have in its section
            made = {**made, "meft": _without(made["meft"], "rank"), "lora": _without(made["lora"], "r")}
        for name, value in layer.items():
            made[name] = {**made[name], **value} if name in _SECTIONS else value
    return made


def _without(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != name}


def resolve(given: Mapping[str, Any], task: Task, *, encoder: bool) -> Settings:
    """Fill in what was left open.

    Args:
        given: what :func:`check_given` passed.
        task: what to train for.
        encoder: whether the model begins with a new head, as an encoder does, and not as a language model.

    Raises:
        ValueError: a setting is out of range.
    """
    batch, eval_batch = _BATCH_SIZES[task]
    sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": eval_batch}
    method, merged = given.get("method") or "meft", bool(given.get("merge"))
    rank, asked = given.get("rank"), given.get("lora") or {}
    lora: dict[str, Any] = {}
    if method == "lora":
        check_no_adapters({name: value for name, value in given["meft"].items() if value is not None}, "method lora")
        meft = MeftConfig(adapters="none", **given["meft"])
        lora = {**_LORA, **asked, **({} if rank is None else {"r": rank})}
    else:
        if asked or merged:
            what = "merge" if merged else f"lora.{next(iter(asked))}"
            raise ValueError(f"{what} is for method lora: adapters of MEFT cannot be merged")
        ranked = {} if rank is None else {"rank": rank}
        meft = MeftConfig(**{**(_ENCODER_MEFT if encoder else {}), **given["meft"], **ranked})
        if meft.adapters == "none":
            raise ValueError(
                "meft.adapters 'none' leaves nothing to train: method lora trains a LoRA, without adapters"
            )
    rate = _LORA_TRAINING if method == "lora" and not encoder else {}
    pin = {"dataloader_pin_memory": torch.cuda.is_available()}  # torch warns where there is nothing to pin for
    return Settings(
        model=given["model"],
        task=task,
        dtype=given.get("dtype") or "float32",
        method=method,
        merge=merged,
        data=DataSettings(**given["data"]),
        meft=meft,
        lora=lora,
        training={**_TRAINING, **rate, **sizes, **pin, **given["training"]},
    )


def differences(recorded: Settings, now: Settings) -> list[str]:
    """What a resumed run would do otherwise than it began, as ``name: then -> now``."""
    found = []
    then, after = _flat(recorded.plain()), _flat(now.plain())
    for name in sorted(then.keys() | after.keys()):
        if name not in HARMLESS and then.get(name) != after.get(name):
            found.append(f"{name}: {then.get(name)!r} -> {after.get(name)!r}")
    return found


def absolute(name: str) -> str:
    """A file or folder as a path that holds wherever the run is resumed from; other names as they are."""
    return str(Path(name).resolve()) if name not in (*NAMES, *REVIEW_SETS) and Path(name).exists() else name


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in settings.items():
        made |= {f"{name}.{key}": entry for key, entry in value.items()} if name in _SECTIONS else {name: value}
    return made


def _check_names(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: {no_setting(name, known)}")


_SIMPLE = (int, float, bool, str, dict, list, types.NoneType)


def _check_types(given: Any, cls: type, where: str) -> None:
    """``given`` is a mapping, or an object of the dataclass; annotations beyond plain types are not checked."""
    values = given if isinstance(given, Mapping) else vars(given)
    for name, annotation in typing.get_type_hints(cls).items():
        if name not in values:
            continue
        value = values[name]
        union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        kinds = [typing.get_origin(kind) or kind for kind in (typing.get_args(annotation) if union else (annotation,))]
        if not all(kind in _SIMPLE for kind in kinds):
            continue
        allowed = {*kinds, int} if float in kinds else set(kinds)
        if type(value) not in allowed:
            words = " or ".join("nothing" if kind is types.NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{where}.{name} is {words}, not {value!r}")
