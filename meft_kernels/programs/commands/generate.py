"""``meft-kernels generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import BaseModel, Trained, batches, console, default_device, errors, quiet, user_errors

GENERATED = "generated"


def generate(
    folder: Trained,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; or a file of them with --data.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A .csv or .jsonl file with a column of prompts, or a .txt file, a prompt a line."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The column with the prompt; by default as in training.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .csv or .jsonl file for the rows and what was generated, not the screen.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token; 1: each as likely as it is.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Only the likeliest tokens, up to this share.")] = 1,
    seed: Annotated[int, typer.Option(help="With a temperature: another seed, another text.")] = 0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="As a user's turn, or as it is; by default as in training.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    base_model: BaseModel = None,
) -> None:
    """What a language model that `train` left makes of prompts, written as they were in training."""
    with user_errors():
        from ..using.folder import find_trained
        from ..using.rows import check_out, read_rows, texts_of, write_rows

        trained = find_trained(folder, "causal-lm", base_model)
        if bool(prompts) == (data is not None):
            raise ValueError('say what to go on from: prompts, "Once upon a time", or a file with --data, and not both')
        what = "instruction" if trained.layout == "instruction" else "prompt"
        column = prompt or trained.of_data(what, what)
        rows: list[dict[str, Any]] = (
            [{column: each} for each in prompts or []] if data is None else read_rows(data, column)
        )
        wanted = texts_of(rows, column, str(data or "the command line"), "--prompt")
        beside = trained.of_data("input", "input") if what == "instruction" else None
        check_out(out, rows, (GENERATED,))

        quiet()
        import torch

        from ..using.generate import Prompts, Sampling, check_lengths, continuations
        from ..using.load import load

        model, tokenizer = load(trained, default_device())
        maker = Prompts(tokenizer, trained.layout, chat)
        ids = [
            maker.ids(text, str(row.get(beside) or "") if beside else "")
            for text, row in zip(wanted, rows, strict=True)
        ]
        check_lengths(model, ids, max_new_tokens)
        torch.manual_seed(seed)
        sampling = Sampling(max_new_tokens, temperature, top_p)
        made = continuations(model, tokenizer, batches(ids, batch_size, errors), sampling)
        if out is not None:
            write_rows(out, [row | {GENERATED: text} for row, text in zip(rows, made, strict=True)])
            console.print(f"written to {out}: {len(rows)} rows", highlight=False, markup=False, soft_wrap=True)
            return
        for asked, text in zip(wanted, made, strict=True):
            if len(wanted) > 1:
                console.print(f"> {asked}", style="bold", highlight=False, markup=False, soft_wrap=True)
            console.print(text, highlight=False, markup=False, soft_wrap=True)
