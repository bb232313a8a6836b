"""Which task a file's columns are for. Without torch: a mistyped name is told before seconds of imports."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Task = Literal["classification", "causal-lm"]
TASKS: tuple[Task, ...] = ("classification", "causal-lm")

COLUMNS = {name: name for name in ("text", "label", "prompt", "completion", "messages")}
"""What is looked for in a row, and the column that has it if nothing else is said."""


def choose(
    name: str, present: Sequence[str], columns: Mapping[str, str], requested: Task | None
) -> tuple[Task, tuple[str, ...]]:
    """The task that the columns are for, or the columns for the task that was asked for.

    Args:
        name: of the data, for messages.
        present: the columns that it has.
        columns: which column has what, by the names of :data:`COLUMNS`.
        requested: a task, None for the one that the columns are for.

    Raises:
        ValueError: the columns are for no task.
    """
    layouts: list[tuple[Task, tuple[str, ...]]] = [
        ("causal-lm", (columns["messages"],)),
        ("causal-lm", (columns["prompt"], columns["completion"])),
        ("classification", (columns["text"], columns["label"])),
        ("causal-lm", (columns["text"],)),
    ]
    if requested is None:
        # Of what is left another task might be made: a language model, where the name of the label was mistyped.
        for what, column in columns.items():
            if column != COLUMNS[what] and column not in present:
                raise ValueError(f"data.{what}: {name} has no column {column!r}; it has {', '.join(present)}")
    for task, wanted in layouts:
        if requested in (None, task) and set(wanted) <= set(present):
            return task, wanted
    said = " or ".join(" and ".join(wanted) for task, wanted in layouts if requested in (None, task))
    raise ValueError(
        f"{name} has the columns {', '.join(present)}; wanted {'' if requested is None else f'for {requested} '}is "
        f"{said}. Other names: --text and --label, or in the YAML file of --config "
        "'data: {text: review, label: stars}', prompt, completion and messages likewise"
    )


def check_file(data: Mapping[str, Any], requested: Any) -> None:
    """Look at the columns of a .csv or .jsonl file, if that is what the data are. What cannot be read is passed over.

    Args:
        data: settings of the section ``data``, as they came.
        requested: the task that was asked for, None for none.

    Raises:
        ValueError: as :func:`choose` does.
    """
    name, columns = data.get("source"), COLUMNS | {key: data[key] for key in COLUMNS if key in data}
    if not isinstance(name, str) or requested not in (None, *TASKS):
        return
    if not all(isinstance(column, str) for column in columns.values()):
        return
    try:
        present = _columns_of(Path(name))
    except (OSError, ValueError, csv.Error):
        return
    if present:
        choose(name, present, columns, requested)


def _columns_of(path: Path) -> list[str]:
    if path.suffix not in (".csv", ".jsonl") or not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", newline="") as lines:
        if path.suffix == ".csv":
            return next(csv.reader(lines), [])
        present: dict[str, None] = {}  # rows may differ, and a column that a late one has is a column
        for line in lines:
            row = json.loads(line) if line.strip() else {}
            present |= dict.fromkeys(row) if isinstance(row, dict) else {}
        return list(present)
