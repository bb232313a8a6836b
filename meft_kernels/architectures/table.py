"""The table of supported models: made from the registry once, and read without it by who only shows it."""

from __future__ import annotations

import json
from pathlib import Path

from .registry import find_architecture, supported_model_types

TABLE = Path(__file__).parent / "supported.json"
"""What ``meft-kernels models`` shows: with torch and every family it would take seconds for a page of text."""


def supported_models() -> list[list[str]]:
    """A row for every model type with a family file: the model's name, its ``config.model_type``, notes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    rows = []
    for model_type in supported_model_types():
        spec = find_architecture(model_type)
        assert spec is not None
        name = CONFIG_MAPPING_NAMES.get(model_type, model_type).removesuffix("Config")
        rows.append([name, model_type, spec.notes])
    return rows


def write_table() -> None:
    """Make the table anew, after a change of a family."""
    TABLE.write_text(json.dumps(supported_models(), indent=1) + "\n", encoding="utf-8")
