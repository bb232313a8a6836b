"""What is in a trained folder: read from its JSON and YAML, without torch, so that a wrong one is told of at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..training.columns import TASKS, Task
from ..training.yaml_file import read_yaml

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
SETTINGS, RUN = "settings.yaml", "run.json"
CLASSES = "classes.json"
"""Names of the classes, in the order of the labels, beside a LoRA: PEFT's own files have none."""

_TASK_OF_CLASS: dict[str, Task] = {
    "ForSequenceClassification": "classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}
_TASK_OF_PEFT: dict[str, Task] = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm"}


@dataclass(frozen=True)
class Trained:
    """A folder that can be loaded."""

    folder: Path
    """With the weights; below the one that was named, if that is a run's."""
    kind: Literal["meft", "peft", "whole"]
    """Adapters of ours, PEFT's, or a whole model of transformers."""
    task: Task
    base: str
    """Path or hub id of the pretrained model; empty for a whole one."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run that wrote it; empty if that is not known."""
    layout: str | None = None
    """What the run's rows held first (:data:`~meft_kernels.programs.training.columns.COLUMNS`), None if not known."""

    def of_data(self, name: str, default: Any = None) -> Any:
        """A setting of the run's section ``data``."""
        return self.settings.get("data", {}).get(name, default)


def find_trained(named: Path, wanted: Task, base_model: str | None = None) -> Trained:
    """What ``meft-kernels train``, ``save_adapter``, PEFT or ``save_pretrained`` wrote.

    Args:
        named: a run's folder, or one with an adapter or a whole model.
        wanted: the task that it must have been trained for.
        base_model: where the pretrained model is, if not where the folder says.

    Raises:
        ValueError: there is nothing to load in it, it was trained for something else, or its base model is gone.
    """
    folder = _with_weights(named)
    run = next((place for place in (folder, folder.parent) if (place / SETTINGS).is_file()), None)
    settings = {} if run is None else read_yaml(run / SETTINGS)
    noted = _read(run / RUN) if run is not None and (run / RUN).is_file() else {}
    if (folder / ADAPTER_CONFIG).is_file():
        config = _read(folder / ADAPTER_CONFIG)
        kind: Literal["meft", "peft", "whole"] = "meft" if config.get("library") == "meft_kernels" else "peft"
        base = base_model or config.get("base_model_name_or_path")
        trained_as = str(config.get("base_model_class" if kind == "meft" else "task_type"))
        if not base or not isinstance(base, str):
            raise ValueError(f"{folder / ADAPTER_CONFIG} does not name the base model: say where it is, --base-model")
        if Path(base).is_absolute() and not Path(base).exists():
            raise ValueError(f"the base model of {folder} is no longer at {base}: say where it is, --base-model")
    else:
        config, kind, base = _read(folder / MODEL_CONFIG), "whole", ""
        trained_as = " ".join(map(str, config.get("architectures") or []))
    task = settings.get("task") or _task_of(trained_as)
    if task not in TASKS:
        raise ValueError(f"{folder} was trained as {trained_as}, which is for none of {', '.join(TASKS)}")
    if task != wanted:
        command = {"classification": "predict", "causal-lm": "generate"}[task]
        raise ValueError(f"{named} was trained for {task}, not for {wanted}: meft-kernels {command} is for it")
    return Trained(folder, kind, task, base, settings, noted.get("layout"))


def _with_weights(named: Path) -> Path:
    if not named.is_dir():
        raise ValueError(f"there is no folder {named}")
    for folder in (named, named / "adapter"):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    if (named / MODEL_CONFIG).is_file():
        return named
    if (named / SETTINGS).is_file():
        raise ValueError(
            f"the run in {named} has not come to its end: meft-kernels train --resume --out {named} goes on with it"
        )
    raise ValueError(
        f"{named} holds no adapter: wanted is the --out of meft-kernels train, or a folder with {ADAPTER_CONFIG}"
    )


def _task_of(trained_as: str) -> Task | None:
    if trained_as in _TASK_OF_PEFT:
        return _TASK_OF_PEFT[trained_as]
    return next((task for end, task in _TASK_OF_CLASS.items() if trained_as.endswith(end)), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return found
