"""``meft-kernels train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import console, errors, given, quiet, user_errors

INTERRUPTED = 130
"""The exit code of shells for a process that Ctrl-C ended."""


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, adapter, settings, log and figures.")],
    model: Annotated[
        str | None, typer.Option(help="minilm, smollm2, gemma3, a .gguf file, a folder or a hub id.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="imdb, rotten_tomatoes, a .csv or .jsonl file, a folder of save_to_disk, a hub data set."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with model, task, dtype and the sections data, meft, training.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classification or causal-lm; by default what the columns of the data are for.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="meft (adapters of its own) or lora (PEFT's, in reversible layers)")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="training.num_train_epochs")] = None,
    steps: Annotated[int | None, typer.Option(help="training.max_steps, instead of epochs")] = None,
    batch_size: Annotated[int | None, typer.Option(help="training.per_device_train_batch_size")] = None,
    lr: Annotated[float | None, typer.Option(help="training.learning_rate")] = None,
    seed: Annotated[int | None, typer.Option(help="training.seed")] = None,
    variant: Annotated[str | None, typer.Option(help="meft.variant: meft1, meft2 or meft3")] = None,
    rank: Annotated[int | None, typer.Option(help="meft.rank, or lora.r with --method lora")] = None,
    alpha: Annotated[int | None, typer.Option(help="lora.lora_alpha")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="lora.target_modules: all-linear, or names with commas between")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="With --method lora: write the merged model, too, to serve as it is.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="data.text: name of the column with the text")] = None,
    label: Annotated[str | None, typer.Option(help="data.label: name of the column with the class")] = None,
    max_length: Annotated[int | None, typer.Option(help="data.max_length")] = None,
    train_texts: Annotated[int | None, typer.Option(help="data.train_texts")] = None,
    held_out: Annotated[float | None, typer.Option(help="data.held_out: a number of texts, or a share")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run in --out.")] = False,
) -> None:
    """Fine-tune a model on a file of texts, with Hugging Face's Trainer. Ctrl-C saves a checkpoint and stops.

    Plain columns: text and label (classification); text, prompt and completion, or messages (causal-lm). Everything
    else can be said in --config; what is said here wins.
    """
    with user_errors():
        if resume and overwrite:
            raise ValueError("--resume goes on with the run that --overwrite would remove: give one of them")
        quiet()
        from ..training.columns import check_file
        from ..training.yaml_file import read_yaml

        read = {} if config is None else read_yaml(config)
        given_data = read.get("data")
        in_section = given_data if isinstance(given_data, dict) else {"source": given_data}
        check_file({**in_section, **given(source=data, text=text, label=label)}, task or read.get("task"))

        from ..training.run import HISTORY, METRICS
        from ..training.run import train as run
        from ..training.settings import check_given
        from ..training.settings import merge as over
        from ..using.folder import SETTINGS

        if held_out is not None and held_out >= 1:
            if held_out != int(held_out):
                raise ValueError(f"--held-out is a number of texts or a share below 1, not {held_out}")
            held_out = int(held_out)
        flags: dict[str, Any] = {
            **given(model=model, task=task, dtype=dtype, method=method, rank=rank, merge=merge or None),
            "data": given(
                source=data, text=text, label=label, max_length=max_length, train_texts=train_texts, held_out=held_out
            ),
            "meft": given(variant=variant),
            "lora": given(lora_alpha=alpha, target_modules=_names(target_modules)),
            "training": given(
                num_train_epochs=epochs,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=lr,
                seed=seed,
            ),
        }
        in_file = {} if config is None else check_given(read, str(config))
        try:
            outcome = run(over(in_file, flags), out, resume=resume, overwrite=overwrite, console=console)
        except KeyboardInterrupt:  # before the first step, or in the last evaluation
            errors.print(f"\ninterrupted. Go on: {_resume_command(out)}", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
    if outcome.interrupted:
        console.print(
            f"stopped at step {outcome.step}, checkpoint saved. Go on: {_resume_command(out)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED)
    from ..training.classes import class_table
    from ..training.progress import describe_metrics

    if outcome.by_class:
        console.print(class_table(outcome.by_class))
    console.print(f"held out: {describe_metrics(outcome.metrics)}", highlight=False)
    console.print(f"written to {out}: {', '.join((*outcome.leaves, METRICS, SETTINGS, HISTORY))}", highlight=False)
    said = 'predict {} "a text"' if outcome.by_class else 'generate {} "a prompt"'
    console.print(f"try it: meft-kernels {said.format(out)}", highlight=False, markup=False, soft_wrap=True)
    tokenizer = f'transformers.AutoTokenizer.from_pretrained("{out / outcome.leaves[0]}")'
    console.print(f"its tokenizer: {tokenizer}", highlight=False, markup=False, soft_wrap=True)
    for use in outcome.uses:
        console.print(f"use it: {use}", highlight=False, markup=False, soft_wrap=True)


def _names(given: str | None) -> str | list[str] | None:
    """``all-linear`` is PEFT's word for a choice; else there is one name or more."""
    return given if given in (None, "all-linear") else given.split(",")


def _resume_command(out: Path) -> str:
    return f"meft-kernels train --resume --out {out}"
