"""What commands share: options, errors, output."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track

from ...config import MeftConfig, no_setting
from ...errors import MeftError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Option(help="minilm, smollm2, gemma3, a .gguf file, a folder or a hub id.")]
Data = Annotated[str, typer.Option(help="rotten_tomatoes, imdb, or a .csv file with the columns text and label.")]
Variant = Annotated[str, typer.Option(help="meft1, meft2 or meft3.")]
Rank = Annotated[int | None, typer.Option(help="Bottleneck width of the adapters.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Trained = Annotated[Path, typer.Argument(help="The --out of train, or a folder with an adapter or a whole model.")]
BaseModel = Annotated[str | None, typer.Option(help="Where the base model is, if not where the adapter says.")]
EstimatedModel = Annotated[
    str, typer.Option(help="A hub id, a folder with a config.json, minilm, smollm2, or a built-in shape.")
]
Weights = Annotated[
    str | None, typer.Option(help="4bit or 8bit: the layers' linear modules quantised. Default: as --dtype.")
]
AnyLength = Annotated[
    bool, typer.Option("--any-length", help="Texts longer than the model's positions too, as people extend them.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting of MEFT: attention=pieces, remainders=host, tile=512. May be repeated."),
]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """What the user can put right is said in red and ends with 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (MeftError, ValueError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None


def quiet() -> None:
    """Keep the notes that loading a model and a file prints out of the way of our own output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    # PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()


def to_dtype(name: str) -> torch.dtype:
    """The dtype that ``--dtype`` names."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"--dtype is one of {', '.join(known)}, not {name!r}")
    return known[name]


def default_device() -> torch.device:
    """The GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settings_of(texts: list[str] | None) -> dict[str, Any]:
    """What ``--set name=value`` gives, its values as Python's where they are, else as text.

    Raises:
        ValueError: not of this form, or no setting of this name.
    """
    known = [f.name for f in dataclasses.fields(MeftConfig)]
    found = {}
    for text in texts or []:
        name, written, value = text.partition("=")
        if not written or not value:
            raise ValueError(f"--set is name=value, as in attention=pieces, not {text!r}")
        if name not in known:
            raise ValueError(no_setting(name, known))
        try:
            found[name] = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def batches(items: Sequence[T], size: int, shown_on: Console) -> Iterator[Sequence[T]]:
    """So many at a time, with a bar on a terminal that goes away at the end."""
    starts = range(0, len(items), size)
    bar = track(starts, "texts", console=shown_on, transient=True, disable=not shown_on.is_terminal)
    return (items[start : start + size] for start in bar)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
