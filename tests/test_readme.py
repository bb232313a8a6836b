"""README and the pages under docs/ say what is."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from typer.testing import CliRunner

import meft_kernels
from meft_kernels.architectures.table import TABLE, supported_models
from meft_kernels.programs.cli import app

from .architectures.zoo import ZOO

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_settings_table() -> None:
    settings = page("settings.md")
    for option in dataclasses.fields(meft_kernels.MeftConfig):
        row = f"| `{option.name}` | `{option.default!r}` | {option.metadata['help']} |"
        assert row in settings, f"docs/settings.md lacks the row: {row}"


def test_supported_models() -> None:
    """Made from the registry; tests/architectures proves every row, since its models are made from the registry too."""
    assert json.loads(TABLE.read_text(encoding="utf-8")) == supported_models(), (
        "python -m benchmarks.model_sweep --table"
    )
    table = CliRunner().invoke(app, ["models", "--markdown"]).output
    assert table in page("supported-models.md")
    assert all(f"| `{model_type}` |" in table for model_type in meft_kernels.supported_model_types())
    assert set(meft_kernels.supported_model_types()) <= ZOO.keys()


def test_models_command() -> None:
    shown = CliRunner().invoke(app, ["models"]).output
    assert all(model_type in shown for model_type in meft_kernels.supported_model_types())


def test_commands() -> None:
    assert 'pip install -c constraints.txt -e ".[demo]" && meft-kernels demo' in README
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in README


def test_names_in_the_tour() -> None:
    tour = page("tour.md")
    for name in (
        "patch",
        "describe",
        "print_trainable_parameters",
        "verify",
        "save_adapter",
        "load_adapter",
        "unpatch",
    ):
        assert f"meft_kernels.{name}(" in tour
        assert callable(getattr(meft_kernels, name))


def test_every_row_of_what_it_composes_with_names_its_tests() -> None:
    rows = page("composes.md").split("Something raised?")[0]
    rows = [row for row in rows.splitlines() if row.startswith("| ")][2:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)`", row.split(" | ")[2])
        assert named, row
        assert not [name for name in named if not (ROOT / name).exists()]
