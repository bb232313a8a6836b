"""Which of a run's checkpoints are whole: a process that is killed may leave half of one."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...checkpoint.files import CONFIG_NAME

_NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"
_TORCH_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def find_checkpoints(out: Path) -> list[Path]:
    """Folders named as a Trainer names its checkpoints, the latest first."""
    found = [(int(match[1]), path) for path in out.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """What a Trainer noted beside its weights: steps, log history."""
    return dict(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))


def what_is_missing(checkpoint: Path, weights: Iterable[str]) -> str | None:
    """Why a checkpoint cannot be resumed from, None if it can; ``weights`` are the files of weights in a whole one.

    A Trainer writes ``trainer_state.json`` last, and not at once; ``transformers.get_last_checkpoint`` takes the folder
    with the highest number, whatever is in it. The other files are looked at, too: after a crash of the whole machine
    any of them may be short.
    """
    try:
        state = trainer_state(checkpoint)
    except FileNotFoundError:
        return f"it has no {STATE}"
    except (OSError, ValueError):
        return f"its {STATE} is damaged"
    if checkpoint.name != f"checkpoint-{state.get('global_step')}":
        return f"its {STATE} is that of step {state.get('global_step')}"
    for name in _TORCH_FILES:
        # A zip's directory is at its end.
        if not zipfile.is_zipfile(checkpoint / name):
            return f"its {name} is {'damaged' if (checkpoint / name).exists() else 'missing'}"
    if not (checkpoint / CONFIG_NAME).is_file():
        return f"it has no {CONFIG_NAME}"
    for name in weights:
        try:
            with safe_open(checkpoint / name, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"its {name} is {'damaged' if (checkpoint / name).exists() else 'missing'}"
    return None
