"""``meft-kernels plan``: with which settings fine-tuning fits into a memory."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from ...config import MeftConfig
from ...errors import BudgetError
from .shared import (
    AnyLength,
    DType,
    EstimatedModel,
    Rank,
    Settings,
    Weights,
    console,
    errors,
    given,
    quiet,
    settings_of,
    to_dtype,
    user_errors,
)


def plan(
    model: EstimatedModel = "llama-3.1-8b",
    batch: Annotated[int, typer.Option(min=1, help="Texts in a batch.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 512,
    gpu: Annotated[str, typer.Option(help="Memory to fit into: 80GB, 24GiB.")] = "24GiB",
    dtype: DType = "bfloat16",
    rank: Rank = None,
    weights: Weights = None,
    set_: Settings = None,
    allow_coefficient: Annotated[
        bool, typer.Option("--allow-coefficient", help="A coefficient of -1/8 too, which changes what is computed.")
    ] = False,
    any_length: AnyLength = False,
) -> None:
    """The fastest settings of MEFT with which a training step fits into a memory. Exit code 1 where none do."""
    with user_errors():
        quiet()
        from ...estimate.shapes import find_config
        from ...estimate.sizes import memory_size
        from ...planning import plan as find_plan

        capacity = memory_size(gpu)
        settings = settings_of(set_) | given(rank=rank)
        try:
            with console.status("planning"):
                found = find_plan(
                    find_config(model), memory=capacity, batch=(batch, seq), dtype=to_dtype(dtype),
                    weights=cast(Any, weights), allow_coefficient=allow_coefficient, any_length=any_length, **settings,
                )  # fmt: skip
        except BudgetError as error:
            errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        stored = "" if weights is None else f", {weights} weights"
        console.print(f"{model}, {dtype}{stored}", highlight=False)
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
        changed = found.changed(MeftConfig())
        console.print("in a file for meft-kernels train --config:", highlight=False)
        lines = (
            ["meft:", *(f"  {name}: {_yaml(value)}" for name, value in changed.items())] if changed else ["meft: {}"]
        )
        console.print("\n".join(lines), markup=False, highlight=False)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else f"'{value}'" if isinstance(value, str) else str(value)
