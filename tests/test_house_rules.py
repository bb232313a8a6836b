"""Rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "meft_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_of_a_size_to_be_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    a_family = path.parent.name == "architectures" and "register_architecture(\n" in text
    assert len(text.splitlines()) <= (150 if a_family else 400)


def test_the_engine_knows_no_family() -> None:
    """Only who finds a family by its name, and who writes the name to a file, may speak of model types."""
    for room in ("ops", "engine", "loss", "patching", "reports"):
        for path in (PACKAGE / room).rglob("*.py"):
            said = "if model_type ==" if path.name == "targets.py" else r"\bmodel_type\b"
            assert not re.search(said, path.read_text(encoding="utf-8")), path.name
