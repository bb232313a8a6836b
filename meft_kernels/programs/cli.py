"""``meft-kernels demo | train | predict | generate | bench | estimate | plan | verify | models | env``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import runpy
from pathlib import Path
from typing import Annotated, Any

try:
    import typer

    from .commands.bench import bench
    from .commands.estimate import estimate
    from .commands.generate import generate
    from .commands.models import models
    from .commands.plan import plan
    from .commands.predict import predict
    from .commands.shared import (
        Data,
        DType,
        Model,
        Rank,
        Variant,
        console,
        default_device,
        errors,
        given,
        quiet,
        to_dtype,
        user_errors,
    )
    from .commands.train import train
except ModuleNotFoundError as error:  # the library needs neither typer nor rich
    raise SystemExit(f'the command line needs the package {error.name}: pip install "meft_kernels[demo]"') from None

from ..config import MeftConfig

DEFAULT_VARIANT = MeftConfig().variant

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(importlib.metadata.version("meft_kernels"), highlight=False)
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Fine-tune pretrained transformers through a bit-exact reversible stack."""


@app.command()
def demo(
    model: Model = "minilm",
    data: Data = "rotten_tomatoes",
    variant: Variant = DEFAULT_VARIANT,
    compare: Annotated[bool, typer.Option("--compare", help="Train PEFT LoRA on the same batches too.")] = False,
    methods: Annotated[
        str | None, typer.Option(help="With --compare, which: meft,lora,lora_checkpointing (the default).")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds; mean and spread.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Texts in a batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of MEFT.")] = None,
    lora_lr: Annotated[float | None, typer.Option(help="Peak learning rate of LoRA.")] = None,
    rank: Rank = None,
    max_length: Annotated[int | None, typer.Option(min=16, help="Tokens of a text, at most.")] = None,
    held_out: Annotated[int | None, typer.Option(min=1, help="Texts to measure the accuracy on.")] = None,
    train_texts: Annotated[int | None, typer.Option(min=1, help="Texts to train on; all by default.")] = None,
    dtype: DType = "float32",
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the figures and the plot.")] = Path("meft-demo"),
) -> None:
    """Fine-tune a pretrained model on film reviews, and show what it takes."""
    with user_errors():
        quiet()
        import torch

        from ..comparison.recipes import recipe_for, too_short
        from ..comparison.tasks import Task
        from ..comparison.texts import load_texts
        from ..packages import require
        from .demo.report import plot, table, write_json
        from .demo.run import METHODS, Demo, run_demo

        chosen: tuple[str, ...] = METHODS if compare else METHODS[:1]
        if methods is not None:
            chosen = tuple(method for method in METHODS if method in methods.split(","))
            if unknown := set(methods.split(",")) - set(METHODS):
                raise ValueError(f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(METHODS)}")
            if not compare or chosen[0] != "meft":
                raise ValueError("--methods goes with --compare, and meft is always one of them")
        for module in ("datasets", *(("peft", "matplotlib") if compare else ())):
            require(module)  # before minutes of training, not after
        task = Task.of(model, load_texts(data, held_out=1))
        recipe = dataclasses.replace(
            recipe_for(causal=task.causal),
            **given(
                steps=steps,
                batch_size=batch_size,
                lr=lr,
                lora_lr=lora_lr,
                rank=rank,
                max_length=max_length,
                held_out=held_out,
            ),
        )
        task.max_length = recipe.max_length
        job = Demo(
            model=model,
            data=data,
            recipe=recipe,
            config=MeftConfig(**{**recipe.meft, "variant": variant, "rank": recipe.rank}),
            methods=chosen,
            seeds=tuple(range(seed, seed + seeds)),
            out=out,
            dtype=to_dtype(dtype),
            device=default_device(),
            train_texts=train_texts,
        )
        out.mkdir(parents=True, exist_ok=True)
        console.print(f"{model} on {data}, {job.device}, {torch.get_num_threads()} threads", highlight=False)
        outcomes = run_demo(job, task, on_outcome=lambda outcome: console.print(outcome.line(), highlight=False))
        console.print(table(job, outcomes), crop=False)
        if (said := too_short(recipe, causal=task.causal)) is not None:
            console.print(said, style="yellow", highlight=False, soft_wrap=True)
        write_json(job, outcomes, out / "results.json")
        written = ["adapter", "results.json"]
        if compare:
            plot(job, outcomes, out / "comparison.png")
            written.append("comparison.png")
        console.print(f"written to {out}: {', '.join(written)}", highlight=False)
    if any(outcome.bit_exact is False or outcome.same_after_reload is False for outcome in outcomes):
        errors.print("the run was not exact: please report this, with the output of: meft-kernels env", style="red")
        raise typer.Exit(1)


app.command()(train)
app.command()(predict)
app.command()(generate)
app.command()(bench)
app.command()(estimate)
app.command()(plan)


@app.command()
def verify(
    model: Model = "minilm",
    data: Data = "rotten_tomatoes",
    variant: Variant = DEFAULT_VARIANT,
    arithmetic: Annotated[str, typer.Option(help="exact or float.")] = "exact",
    coupling: Annotated[str, typer.Option(help="centered or paper.")] = "centered",
    lam: Annotated[float | None, typer.Option(help="Coefficient of the first lane.")] = None,
    beta: Annotated[float | None, typer.Option(help="Coefficient of the second lane.")] = None,
    rank: Rank = None,
    fraction_bits: Annotated[int | None, typer.Option(help="Bits after the point; calibrated by default.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's settings for the variant.")] = False,
    dtype: DType = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in the batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=16, help="Tokens of a text, at most.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the batch and the adapters.")] = 0,
) -> None:
    """Is every layer of this model rebuilt bit for bit? Exit code 1 if not."""
    with user_errors():
        quiet()
        import torch

        from ..comparison.tasks import Task
        from ..comparison.texts import load_texts
        from ..patching.patch import patch
        from ..reports.verify import verify as run_verify

        chosen = given(rank=rank, lam=lam, beta=beta, fraction_bits=fraction_bits)
        settings: dict[str, Any] = {"arithmetic": arithmetic, "coupling": coupling, "variant": variant, **chosen}
        config = MeftConfig.paper(variant, **chosen) if paper else MeftConfig(**settings)  # type: ignore[arg-type]
        texts = load_texts(data, held_out=batch_size, seed=seed)
        task = Task.of(model, texts, max_length=max_length)
        device = default_device()
        network = task.load(dtype=to_dtype(dtype), device=device, seed=seed)
        torch.manual_seed(seed)
        patch(network, config)
        report = run_verify(network, task.batch(texts.held_out, list(range(batch_size)), device))
        console.print(str(report), markup=False, highlight=False)
    if not report.bit_exact:
        raise typer.Exit(1)


app.command()(models)


@app.command()
def env() -> None:
    """Versions, device and kernels: paste this into a bug report."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    lines = {"python": platform.python_version(), "system": platform.platform()}
    packages = ("meft_kernels", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "safetensors")
    lines |= {package: version(package) for package in packages}
    lines["cpu cores"] = str(os.cpu_count())
    lines |= _cuda()
    has_triton = importlib.util.find_spec("triton") is not None
    lines["coupling kernels"] = "triton on CUDA, torch elsewhere" if has_triton else "torch (triton is not installed)"
    lines["variables"] = " ".join(
        f"{name}={os.environ[name]}"
        for name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TRITON_INTERPRET")
        if name in os.environ
    )
    lines = {name: value for name, value in lines.items() if value}
    width = max(map(len, lines))
    for name, value in lines.items():
        console.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)


def _cuda() -> dict[str, str]:
    """What torch sees of GPUs. A build without CUDA says so by its version: torch takes seconds to import."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    of_torch = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    if of_torch.get("cuda") is None and of_torch.get("hip") is None:
        return {"cuda": "torch was built without it"}
    import torch

    lines = {"cuda": str(torch.version.cuda or torch.version.hip) if torch.cuda.is_available() else "no device"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    return lines


def main() -> None:
    """The entry point of the package."""
    app()


if __name__ == "__main__":
    main()
