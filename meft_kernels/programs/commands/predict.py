"""``meft-kernels predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import BaseModel, Trained, batches, console, default_device, errors, quiet, user_errors

PREDICTED, PROBABILITY, PROBABILITIES = "predicted", "probability", "probabilities"


def predict(
    folder: Trained,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; or a file of them with --data.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A .csv or .jsonl file with a column of texts, or a .txt file, a text a line.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The column with the text; by default as in training.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .csv or .jsonl file for the rows and what was predicted, not the screen.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text, at most; by default as in training.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 16,
    base_model: BaseModel = None,
) -> None:
    """The classes of texts, by a model that `train` left, with their probabilities."""
    with user_errors():
        from ..using.folder import find_trained
        from ..using.rows import check_out, read_rows, texts_of, write_rows

        trained = find_trained(folder, "classification", base_model)
        if bool(texts) == (data is not None):
            raise ValueError('say what to predict: texts, "A lovely film.", or a file with --data, and not both')
        column = text or trained.of_data("text", "text")
        rows = [{column: each} for each in texts or []] if data is None else read_rows(data, column)
        wanted = texts_of(rows, column, str(data or "the command line"), "--text")
        check_out(out, rows, (PREDICTED, PROBABILITY, PROBABILITIES))

        quiet()
        from ..using.load import load, longest
        from ..using.predict import class_names, probabilities

        model, tokenizer = load(trained, default_device())
        names, length = class_names(model), longest(trained, model, max_length)
        found: list[dict[str, Any]] = []
        for shares in probabilities(model, tokenizer, batches(wanted, batch_size, errors), length):
            best = max(range(len(names)), key=shares.__getitem__)
            found.append(
                {
                    PREDICTED: names[best],
                    PROBABILITY: round(shares[best], 6),
                    PROBABILITIES: {name: round(share, 6) for name, share in zip(names, shares, strict=True)},
                }
            )
        if out is not None:
            write_rows(out, [row | made for row, made in zip(rows, found, strict=True)])
            console.print(f"written to {out}: {len(found)} rows", highlight=False, markup=False, soft_wrap=True)
            return
        width = max(map(len, names))
        for each, made in zip(wanted, found, strict=True):
            line = f"{made[PREDICTED]:<{width}}  {made[PROBABILITY]:.3f}  {' '.join(each.split())}"
            console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")
