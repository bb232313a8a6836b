"""The table of supported models, made from the registry."""

from __future__ import annotations

from .registry import find_architecture, supported_model_types

COLUMNS = ("model", "`config.model_type`", "notes")


def supported_models() -> list[tuple[str, str, str]]:
    """A row for every supported model type: the model's name, its ``config.model_type``, notes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    rows = []
    for model_type in supported_model_types():
        spec = find_architecture(model_type)
        assert spec is not None
        name = CONFIG_MAPPING_NAMES.get(model_type, model_type).removesuffix("Config")
        rows.append((name, model_type, spec.notes))
    return rows


def as_markdown() -> str:
    """The table as docs/supported-models.md has it."""
    rows = [COLUMNS, ("---",) * 3, *((name, f"`{kind}`", notes) for name, kind, notes in supported_models())]
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)
