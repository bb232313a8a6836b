"""Results as JSON files, each with what it takes to get them again: command, settings, versions, device, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VERSIONED = ("torch", "triton", "transformers", "peft", "meft_kernels")


def device_name(device: torch.device) -> str:
    """The GPU's name; of a CPU its kind and how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, str]:
    """Versions and device of this process."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**versions, "device": device_name(device)}


def command() -> str:
    """What was typed, as it can be typed again: no path of this machine."""
    program = sys.argv[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name != "__main__":  # python -m package.module
        typed = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        typed = [os.path.basename(program)]
    return shlex.join([*typed, *sys.argv[1:]])


@dataclass(frozen=True)
class Record:
    """One file of results.

    Attributes:
        kind: what was measured; the report has a section for each.
        settings: what was asked for; two records with the same kind and settings measure the same.
        figures: what came out, plain values.
    """

    kind: str
    settings: dict[str, Any]
    figures: Any
    command: str = ""
    date: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls, kind: str, settings: dict[str, Any], figures: Any, device: torch.device) -> Record:
        """A record of what this process has measured."""
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return cls(kind, settings, figures, command(), date, environment(device))

    def write(self, path: Path) -> None:
        """Whole or not at all: a reader, or a run that is resumed, never finds half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(vars(self), indent=1, default=str) + "\n", encoding="utf-8")
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Inverse of :meth:`write`.

        Raises:
            ValueError: the file is no record.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no record of results: {error}") from None


def read_all(folder: Path) -> list[Record]:
    """Every record below ``folder``, in the order of their paths."""
    return [Record.read(path) for path in sorted(folder.rglob("*.json"))]
