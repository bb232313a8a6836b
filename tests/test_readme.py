"""README says what is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import meft_kernels

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_settings_table() -> None:
    for option in dataclasses.fields(meft_kernels.MeftConfig):
        row = f"| `{option.name}` | `{option.default!r}` | {option.metadata['help']} |"
        assert row in README, f"README lacks the row: {row}"


def test_supported_families() -> None:
    line = next(line for line in README.splitlines() if line.startswith("* Families:"))
    assert all(name in line.lower() for name in meft_kernels.supported_model_types())


def test_commands() -> None:
    assert 'pip install -c constraints.txt -e ".[demo]" && meft-kernels demo' in README
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in README


def test_names_in_the_tour() -> None:
    for name in (
        "patch",
        "describe",
        "print_trainable_parameters",
        "verify",
        "save_adapter",
        "load_adapter",
        "unpatch",
    ):
        assert f"meft_kernels.{name}(" in README
        assert callable(getattr(meft_kernels, name))
