"""``meft-kernels models``: what can be patched, and whether a given model can be."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Annotated

import typer

from .shared import console, errors, quiet, user_errors

COLUMNS = ("model", "`config.model_type`", "notes")


def models(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/supported-models.md has it.")] = False,
    probe: Annotated[
        str | None, typer.Option(help="A hub id, a folder or a model type: what is found of it, from its config alone.")
    ] = None,
) -> None:
    """The models that can be patched; transformers builds every task head on each. Exit code 1 if the probed cannot."""
    if probe is not None:
        with user_errors():
            quiet()
            from ...architectures.found.sample import look_at
            from ...errors import UnsupportedModelError

            try:
                console.print(look_at(probe), markup=False, highlight=False, soft_wrap=True)
            except UnsupportedModelError as error:
                errors.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
                raise typer.Exit(1) from None
        return
    rows = json.loads((files("meft_kernels") / "architectures" / "supported.json").read_text(encoding="utf-8"))
    if markdown:
        lines = [COLUMNS, ("---",) * 3, *((name, f"`{kind}`", notes) for name, kind, notes in rows)]
        print("".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines), end="")
        return
    from rich.table import Table

    table = Table(*(column.strip("`") for column in COLUMNS))
    for row in rows:
        table.add_row(*row)
    console.print(table)
