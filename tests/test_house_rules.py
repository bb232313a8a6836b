"""Rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "meft_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_of_a_size_to_be_read(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (150 if path.parent.name == "architectures" else 400)


def test_the_engine_knows_no_family() -> None:
    """Only who finds a family by its name, and who writes the name to a file, may speak of model types."""
    allowed = {"targets.py", "layer_lists.py", "cli.py"}
    for path in FILES:
        if path.parent == PACKAGE and path.name not in allowed:
            assert not re.search(r"\bmodel_type\b", path.read_text(encoding="utf-8")), path.name
    assert "if model_type ==" not in (PACKAGE / "targets.py").read_text(encoding="utf-8")
