"""A piece's record, on disk after every item, so that nothing measured is lost when the process dies."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meft_kernels.comparison.records import Record


@dataclass(frozen=True)
class Piece:
    """One process, one record.

    Attributes:
        name: of the file.
        kind: which module runs it.
        settings: what is measured; a record with other settings is none of this piece.
        items: what has an outcome each: rivals, ops, models.
        weight: its part of the time.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    items: tuple[str, ...]
    weight: float


def slug(device: str) -> str:
    """A device's name for a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@dataclass
class Progress:
    """What is known of a piece.

    Attributes:
        items: outcomes by name; one with a ``reason`` has failed, one that is ``unfinished`` is to be measured again.
        running: what is being measured; who finds it set in a file, finds what the process has died of.
        notes: what belongs to no item.
    """

    piece: Piece
    path: Path
    device: torch.device | None = None
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    _record: Record | None = field(default=None, repr=False)

    @classmethod
    def load(cls, piece: Piece, folder: Path, device: torch.device | None = None, *, again: bool = False) -> Progress:
        """From disk, empty if there is nothing of these settings."""
        path = folder / f"{piece.name}.json"
        made = cls(piece, path, device)
        if path.exists() and not again:
            record = Record.read(path)
            if (record.kind, record.settings) == (kind_of(piece), json.loads(json.dumps(piece.settings))):
                made.items, made.running = record.figures["items"], record.figures["running"]
                made.notes = record.figures["notes"]
        return made

    def pending(self) -> list[str]:
        """Items without an outcome, in their order."""
        return [name for name in self.piece.items if self.items.get(name, {"unfinished": True}).get("unfinished")]

    def start(self, name: str) -> None:
        """Say on disk what is tried now."""
        self.running = name
        self._write()

    def put(self, name: str, outcome: dict[str, Any]) -> None:
        """What was found of an item, a ``reason`` if it failed."""
        self.items[name], self.running = outcome, None
        self._write()

    def blame(self, reason: str) -> None:
        """The process died: what ran has failed. For who started it; versions and device stay those of the record."""
        if self.running is None:
            return
        found = {key: value for key, value in self.items.get(self.running, {}).items() if key != "unfinished"}
        self.items[self.running], self.running = {**found, "reason": reason}, None
        dataclasses.replace(Record.read(self.path), figures=self._figures()).write(self.path)

    def _figures(self) -> dict[str, Any]:
        return {"items": self.items, "running": self.running, "notes": self.notes}

    def _write(self) -> None:
        if self._record is None:  # asked for once: a device that a rival has broken no longer tells its name
            assert self.device is not None, "only the process that measures writes"
            record = Record.now(kind_of(self.piece), self.piece.settings, None, self.device)
            # What a reader types to measure it again; only the runner starts workers.
            self._record = dataclasses.replace(record, command=record.command.replace(" --worker ", " --only "))
        dataclasses.replace(self._record, figures=self._figures()).write(self.path)


def kind_of(piece: Piece) -> str:
    """The records' kind."""
    return f"gpu-{piece.kind}"
