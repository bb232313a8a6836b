"""Rows of a file, and rows into a file: CSV, JSON lines, or a text a line. Without torch."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.columns import delimiter_of

_KINDS = (".csv", ".jsonl", ".txt")
Row = dict[str, Any]


def read_rows(path: Path, line: str) -> list[Row]:
    """The rows of a .csv or .jsonl file; the lines of a .txt file, each as the column ``line``.

    Raises:
        ValueError: no such file, of another kind, empty, or one of its rows cannot be read.
    """
    if path.suffix not in _KINDS:
        raise ValueError(f"--data is a file that ends in {', '.join(_KINDS)}, not {path}")
    try:
        if path.suffix == ".csv":
            rows = _from_csv(path)
        else:
            with path.open(encoding="utf-8-sig") as file:
                lines = [(number, text.rstrip("\n")) for number, text in enumerate(file, 1) if text.strip()]
            rows = [{line: text} if path.suffix == ".txt" else _from_json(path, number, text) for number, text in lines]
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty: it has no rows")
    return rows


def texts_of(rows: Sequence[Row], column: str, name: str, option: str) -> list[str]:
    """What each row has in the column.

    Args:
        rows: at least one.
        column: its name.
        name: of the file, for messages.
        option: that names the column, for messages.

    Raises:
        ValueError: there is no such column, or a row has no text in it.
    """
    present = list(dict.fromkeys(key for row in rows for key in row))
    if column not in present:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(present)}: say which, {option}")
    for number, row in enumerate(rows, 1):
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name}, row {number} has no text in {column}: {value!r:.60}")
    return [row[column] for row in rows]


def check_out(path: Path | None, rows: Sequence[Row], added: Sequence[str]) -> None:
    """Before anything is computed: can the file be written, and do the rows leave room for what is added?

    Raises:
        ValueError: another kind of file, its folder does not exist, or a column is there already.
    """
    if path is None:
        return
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--out is a file that ends in .csv or .jsonl, not {path}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}")
    if taken := [name for name in added if any(name in row for row in rows)]:
        raise ValueError(f"the data have a column {taken[0]!r} already, which would be written over: rename it")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One row a line; in CSV whatever is no text, number or nothing as JSON."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        names = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _from_csv(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the 128 KiB that it is without
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = []
        for number, row in enumerate(csv.DictReader(file, delimiter=delimiter_of(path)), 1):
            if None in row:
                raise ValueError(f"{path}, row {number} has more fields than there are columns")
            rows.append(dict(row))
    return rows


def _from_json(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} is no JSON object: {line:.60}")
    return row
