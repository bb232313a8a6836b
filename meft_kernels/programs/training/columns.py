"""Which task a file's columns are for. Without torch: a mistyped name is told before seconds of imports."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Task = Literal["classification", "causal-lm"]
TASKS: tuple[Task, ...] = ("classification", "causal-lm")

COLUMNS = {
    name: name
    for name in (
        *("text", "label", "prompt", "completion", "messages"),
        *("conversations", "instruction", "input", "output"),
    )
}
"""What is looked for in a row, and the column that has it if nothing else is said."""


@dataclass(frozen=True)
class Layout:
    """What rows hold, by the names of :data:`COLUMNS`."""

    task: Task
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Taken where they are; a row may leave them empty."""


LAYOUTS = (
    Layout("causal-lm", ("messages",)),
    Layout("causal-lm", ("conversations",)),
    Layout("causal-lm", ("prompt", "completion")),
    # Before text: files of this kind bring the whole made prompt as their text, too.
    Layout("causal-lm", ("instruction", "output"), ("input",)),
    Layout("classification", ("text", "label")),
    Layout("causal-lm", ("text",)),
)
"""The first that the columns have is taken."""


def choose(name: str, present: Sequence[str], columns: Mapping[str, str], requested: Task | None) -> Layout:
    """The layout that the columns have, or the one for the task that was asked for.

    Args:
        name: of the data, for messages.
        present: the columns that it has.
        columns: which column has what, by the names of :data:`COLUMNS`.
        requested: a task, None for the one that the columns are for.

    Raises:
        ValueError: the columns are for no task.
    """
    if requested is None:
        # Of what is left another task might be made: a language model, where the name of the label was mistyped.
        for what, column in columns.items():
            if column != COLUMNS[what] and column not in present:
                raise ValueError(f"data.{what}: {name} has no column {column!r}; it has {', '.join(present)}")
    wanted = [layout for layout in LAYOUTS if requested in (None, layout.task)]
    for layout in wanted:
        if {columns[what] for what in layout.needed} <= set(present):
            return layout
    said = " or ".join(" and ".join(columns[what] for what in layout.needed) for layout in wanted)
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
    reason: ValueError | None = None
    try:
        for present in _columns(Path(name)):
            reason = _why_not(name, present, columns, requested)
            if reason is None:
                return
    except (OSError, ValueError, csv.Error):
        return
    if reason is not None:
        raise reason


def _why_not(
    name: str, present: Sequence[str], columns: Mapping[str, str], requested: Task | None
) -> ValueError | None:
    try:
        choose(name, present, columns, requested)
    except ValueError as error:
        return error
    return None


def _columns(path: Path) -> Iterator[list[str]]:
    """The columns of a .csv or .jsonl file, once more whenever a row has a new one; nothing of any other file.

    Rows of JSON may differ, and a column that a late one has is a column. Whoever has found what is needed stops: a
    file may be of many gigabytes, and is read as a whole afterwards.

    Raises:
        OSError, ValueError, csv.Error: it cannot be read.
    """
    if path.suffix not in (".csv", ".jsonl") or not path.is_file():
        return
    with path.open(encoding="utf-8-sig", newline="") as lines:
        if path.suffix == ".csv":
            if head := next(csv.reader(lines, delimiter=delimiter_of(path)), []):
                yield head
            return
        present: dict[str, None] = {}
        for line in lines:
            row = json.loads(line) if line.strip() else {}
            if isinstance(row, dict) and not row.keys() <= present.keys():
                present |= dict.fromkeys(row)
                yield list(present)


def delimiter_of(path: Path) -> str:
    """What stands between the columns of a CSV file: a comma, or where its head has none a semicolon or a tab.

    Programs write semicolons where the comma is the decimal point. Only the head is asked: in it are names, in the rows
    are texts with any of the three.

    Raises:
        OSError, ValueError, csv.Error: it cannot be read.
    """
    with path.open(encoding="utf-8-sig", newline="") as lines:
        head = lines.readline()
    widths = {mark: len(next(csv.reader([head], delimiter=mark), [])) for mark in (",", ";", "\t")}
    return max(widths, key=lambda mark: widths[mark]) if widths[","] < 2 else ","
