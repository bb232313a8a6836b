"""``meft-kernels bench``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .shared import DType, Rank, console, default_device, errors, given, quiet, to_dtype, user_errors

QUICK = {"steps": 6, "batch_size": 4, "max_length": 32, "held_out": 32}
QUICK_RIVALS = "meft2,lora,lora_checkpointing"
RIVALS_HERE = "meft1,meft2,meft3,meft_lora,lora,lora_checkpointing,full,ia3,bottleneck,meft2_paper"

Cases = Annotated[
    list[str] | None,
    typer.Option(
        help="model:data, or model:data:next-token to train on the texts' own tokens; may be repeated. The data is "
        "rotten_tomatoes, imdb, a .csv file, glue/sst2 and its seven siblings, openbookqa, piqa, arc-e, arc-c or "
        "sciq, these from the hub or, as glue/sst2=folder, from a folder of save_to_disk. By default four cases that "
        "need no network."
    ),
]
Rivals = Annotated[str | None, typer.Option(help=f"By default {RIVALS_HERE}, and on CUDA what runs there.")]
Rates = Annotated[list[str] | None, typer.Option(help="A rival's peak learning rate: full=2e-5. May be repeated.")]


def bench(
    case: Cases = None,
    rivals: Rivals = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many: of texts, new heads, adapters and dropout.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Texts in a batch.")] = None,
    max_length: Annotated[int | None, typer.Option(min=16, help="Tokens of a text, at most.")] = None,
    held_out: Annotated[int | None, typer.Option(min=1, help="Texts to measure on.")] = None,
    train_texts: Annotated[int | None, typer.Option(min=1, help="Texts to train on; all by default.")] = None,
    rank: Rank = None,
    lr: Rates = None,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of interleaved steps for the times; 0: none.")] = 7,
    dtype: DType = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="A minute instead of hours: few steps, one seed.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run what is there already, too.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for one JSON a run, table and plots.")] = Path("meft-bench"),
) -> None:
    """Compare MEFT with what people would use instead: quality, memory and time, on the same texts and batches.

    One JSON file a run. What is in --out already is not run again, so that a long comparison can be stopped.
    """
    with user_errors():
        quiet()
        from ...comparison.cases import CASES, Case
        from ...comparison.compare import Comparison
        from ...comparison.recipes import too_short
        from ...comparison.records import read_all
        from ...comparison.rivals import RIVALS, rivals_named
        from ...comparison.runs import Setup
        from ...comparison.tables import markdown, plot, rows_by_case, table
        from ...config import MeftConfig
        from ...packages import require

        for module in ("datasets", "peft", "matplotlib"):
            require(module)
        device = default_device()
        rates = dict(_rate(text) for text in lr or [])
        rivals_named(list(rates))
        chosen = rivals_named((rivals or (QUICK_RIVALS if quick else RIVALS_HERE)).split(","))
        if rivals is None and not quick and device.type == "cuda":
            chosen += [rival for rival in RIVALS.values() if rival.gpu and not rival.why_unavailable(device)]
        for rival in chosen:
            if reason := rival.why_unavailable(device):
                raise ValueError(f"{rival.name} cannot run here: {reason}")
        sizes = {
            **(QUICK if quick else {}),
            **given(steps=steps, batch_size=batch_size, max_length=max_length, held_out=held_out, rank=rank),
        }
        setups = []
        for each in [Case.parse(text) for text in case] if case else CASES[: 1 if quick else None]:
            task = each.task()
            recipe = dataclasses.replace(each.recipe(task), **sizes)
            task.max_length = recipe.max_length
            each.texts(recipe, train_texts, 0)  # what is wrong with them is said before hours of training, not after
            config = MeftConfig(**{**recipe.meft, "rank": recipe.rank})
            setups.append(Setup(each, task, recipe, config, to_dtype(dtype), device, train_texts, rates))
        rounds = min(rounds, 3) if quick else rounds
        Comparison(setups, chosen, range(seed, seed + (1 if quick else seeds)), rounds, out, again).run(console)
        rows = rows_by_case(read_all(out))
        for name, lines in rows.items():
            console.print(table(name, lines), crop=False)
        text = "\n\n".join(f"## {name}\n\n{markdown(lines)}" for name, lines in rows.items())
        (out / "table.md").write_text(text + "\n", encoding="utf-8")
        short = [(setup, too_short(setup.recipe, causal=setup.task.causal)) for setup in setups]
        for setup, said in short:
            if said is not None and not setup.case.language:  # a loss says something after few steps
                console.print(f"{setup.case}: {said}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        written = [f"{against}.png" for against in ("memory", "time") if plot(rows, out, against=against)]
        console.print(f"written to {out}: one JSON a run, table.md, {', '.join(written)}", highlight=False)
    runs = [run for lines in rows.values() for row in lines if not row.rival.endswith("paper") for run in row.runs]
    if any(run.get("bit_exact") is False for run in runs):
        errors.print("a run was not exact: please report this, with the output of: meft-kernels env", style="red")
        raise typer.Exit(1)


def _rate(text: str) -> tuple[str, float]:
    name, found, value = text.partition("=")
    try:
        rate = float(value)
    except ValueError:
        rate = -1.0
    if not found or not 0 < rate < 10:
        raise ValueError(f"--lr is rival=rate, as full=2e-5, not {text!r}")
    return name, rate
