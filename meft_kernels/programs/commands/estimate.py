"""``meft-kernels estimate``: how much memory fine-tuning takes, before anything is downloaded or bought."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ...config import MeftConfig
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

_CAPTION = (
    "From shapes alone, by one training step on tensors without data, unpadded, without autocast, attention as sdpa. "
    "kept: alive after forward; peak: alive in forward and backward beside weights and AdamW's state, the gradients "
    "among it; total: the most at any time, AdamW's update included; longest: tokens of a text that fit; host: in host "
    "memory, at this length and at the longest. {loss} "
    "Tensors only: CUDA's context and the allocator's gaps come on top (of a card sold as 80GB, some 85 x 10^9 bytes, "
    "80 x 10^9 are counted on)."
)
_WITH_LOSS = "Logits and loss are in it, which for a large vocabulary is much: --no-loss leaves them out."
_WITHOUT_LOSS = "Logits and loss are left out, as a fused loss would."


def estimate(
    model: EstimatedModel = "llama-3.1-8b",
    batch: Annotated[int, typer.Option(min=1, help="Texts in a batch.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 512,
    gpu: Annotated[str | None, typer.Option(help="Memory to fit into: 80GB, 24GiB.")] = None,
    dtype: DType = "bfloat16",
    rank: Rank = None,
    rivals: Annotated[
        str | None,
        typer.Option(
            help="Which, separated by commas: meft, meft_host, meft_pieces_host, meft_lora, lora_checkpointing, "
            "lora_chunked_tiled_host, ...; a wrong name lists all of them. Default: fifteen, which takes minutes."
        ),
    ] = None,
    loss: Annotated[bool, typer.Option(help="With logits and loss, or without.")] = True,
    weights: Weights = None,
    adapter_dtype: Annotated[
        str | None, typer.Option(help="float32 or model: of adapters and LoRA. Default: float32, ours and PEFT's own.")
    ] = None,
    set_: Settings = None,
    any_length: AnyLength = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file too.")] = None,
) -> None:
    """Memory of a training step of a model that need not be here: weights, activations, peak, longest context."""
    with user_errors():
        quiet()
        import torch

        from ...comparison.records import Record
        from ...comparison.rivals import UnavailableRivalError, rivals_named
        from ...estimate.estimator import DEFAULT_RIVALS, Estimator, why_not_estimated
        from ...estimate.published import published
        from ...estimate.report import Estimate, figures, table, way_out
        from ...estimate.shapes import find_config
        from ...estimate.sizes import gib, memory_size

        capacity = None if gpu is None else memory_size(gpu)
        chosen = rivals_named(DEFAULT_RIVALS if rivals is None else rivals.split(","))
        for rival in chosen:
            if rivals is not None and (reason := why_not_estimated(rival)):
                raise ValueError(f"{rival.name} cannot be estimated: {reason}")
        config = find_config(model)
        settings = settings_of(set_)
        meft = MeftConfig(**(settings | given(rank=rank, adapter_dtype=adapter_dtype)))
        estimator = Estimator(
            config, to_dtype(dtype), batch, meft, loss=loss, weights=cast(Any, weights), any_length=any_length
        )
        estimates = []
        for number, rival in enumerate(chosen, 1):
            if reason := why_not_estimated(rival):
                estimates.append(Estimate(rival, unavailable=reason))
                continue
            doing = f"estimating {number} of {len(chosen)}: {rival.title}"
            if not errors.is_terminal:  # each takes up to a minute for a large model
                errors.print(doing, markup=False, highlight=False, soft_wrap=True)
            with errors.status(doing):
                try:
                    step = estimator.step(rival, seq)
                    longest = None if capacity is None else estimator.longest(rival, capacity, seq)
                    host = estimator.step(rival, longest).host if longest else 0
                    estimates.append(Estimate(rival, step, longest, host))
                except UnavailableRivalError as error:
                    estimates.append(Estimate(rival, unavailable=str(error)))
        size = "" if capacity is None else f", into {gpu}: {gib(capacity)}"
        stored = "" if weights is None else f" with {weights} weights"
        console.print(f"{model}, {dtype}{stored}, {batch} x {seq:,} tokens{size}", markup=False, highlight=False)
        # Wider than some terminals: columns that leave the screen are worse than lines that break.
        console.print(table(estimates, config=config, capacity=capacity), crop=False)
        console.print(_CAPTION.format(loss=_WITH_LOSS if loss else _WITHOUT_LOSS), style="italic", highlight=False)
        if capacity is not None and (said := way_out(estimates, capacity, rows=batch, quantised=weights is not None)):
            console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)
        for each in estimates:
            if each.unavailable:
                errors.print(f"{each.rival.title}: {each.unavailable}", markup=False, highlight=False)
        for note in (*estimator.notes(), *map(str, published(config, capacity) if capacity else ())):
            console.print(note, markup=False, highlight=False)
        if json is not None:
            record = {
                "model": model, "dtype": dtype, "batch": batch, "seq": seq, "capacity": capacity, "loss": loss,
                "rank": estimator.meft.rank, "weights": weights, "adapter_dtype": estimator.meft.adapter_dtype,
                "settings": settings,
            }  # fmt: skip
            Record.now("estimate", record, [figures(e) for e in estimates], torch.device("cpu")).write(json)
