"""From no reversible layer to all of them: accuracy, kept bytes, the time of a step."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch

import meft_kernels
from benchmarks.real import real_batch, real_model
from benchmarks.step_time import stepper
from meft_kernels import MeftConfig
from meft_kernels.comparison.loop import footprint
from meft_kernels.comparison.records import Record
from meft_kernels.comparison.tables import MIB
from meft_kernels.comparison.timing import interleaved
from meft_kernels.patching.state import unwrap

from . import training
from .shared import CPU, PAPER, Finding, Job, Sizes, change, mean_of, of_kind, percent

KIND = "finding-steps"
CLAIM = (
    "The paper makes some layers reversible and leaves activations of the others: memory against time, and against the "
    "error of the inverse."
)
SCHEMES: dict[str, dict[str, Any]] = {
    "exact": {"variant": "meft2"},
    "paper": {**PAPER, "variant": "meft3"},  # the one whose inverse loses most in each layer
}
ALL_OF = {"minilm": 6, "smollm2": 30}


def trained_config(scheme: str, count: int, layers: int) -> dict[str, Any]:
    """As other findings would write it, so that a run which they have made too is made once."""
    if count == layers:
        return SCHEMES[scheme]
    if count == 0 and scheme == "paper":
        return {**SCHEMES[scheme], "engine": "autograd"}
    return {**SCHEMES[scheme], "reversible_layers": count}


def jobs(sizes: Sizes) -> list[Job]:
    """Costs first."""
    made = [
        _cost_job(sizes, sizes.classifier, tuple(range(ALL_OF[sizes.classifier] + 1))),
        _cost_job(sizes, sizes.language_model, sizes.deep_reversible),
    ]
    for seed in sizes.seeds[:1]:
        for scheme in SCHEMES:
            for count in sizes.reversible:
                config = trained_config(scheme, count, ALL_OF[sizes.classifier])
                made.append(training.job(sizes, f"{scheme}-reversible-{count}", "meft", seed, config))
    return made


def _cost_job(sizes: Sizes, model: str, counts: tuple[int, ...]) -> Job:
    settings = {
        "model": model,
        "config": SCHEMES["exact"],
        "reversible_layers": list(counts),
        "rows": sizes.rows,
        "tokens": sizes.tokens,
        "rounds": sizes.rounds,
    }
    return Job(KIND, f"cost-{model}-{len(counts)}", settings, measure)


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Kept bytes and the times of interleaved steps, forward and backward, one entry a number of layers."""
    base = real_model(settings["model"], torch.float32)
    batch: dict[str, Any] = real_batch(settings["model"], settings["rows"], settings["tokens"])
    if unwrap(base).get_output_embeddings() is not None:
        batch["use_cache"] = False
    models = {}
    for count in settings["reversible_layers"]:
        torch.manual_seed(0)
        shared = {id(p): p for p in base.parameters()}  # frozen weights are one and the same in all copies
        model = copy.deepcopy(base, shared)
        models[count] = meft_kernels.patch(
            model, MeftConfig.from_dict({**settings["config"], "reversible_layers": count})
        )
    sizes = {count: footprint(model, batch) for count, model in models.items()}  # which warms up as well
    steps = {str(count): stepper(model, batch) for count, model in models.items()}
    seconds = interleaved(steps, rounds=settings["rounds"], device=CPU, warm_up=0).seconds
    return [
        {"reversible": count, "kept": size.kept, "peak": size.peak, "seconds": seconds[str(count)]}
        for count, size in sizes.items()
    ]


def _trained(records: list[Record]) -> dict[str, dict[int, list[Record]]]:
    """By scheme and number of reversible layers."""
    found: dict[str, dict[int, list[Record]]] = {scheme: {} for scheme in SCHEMES}
    for record in of_kind(records, training.KIND):
        config, layers = record.settings["config"], ALL_OF[record.settings["model"]]
        scheme = "paper" if config.get("coupling") == "paper" else "exact"
        count = 0 if config.get("engine") == "autograd" else config.get("reversible_layers", layers)
        found[scheme].setdefault(count, []).append(record)
    return {scheme: dict(sorted(by_count.items())) for scheme, by_count in found.items()}


def _costs(records: list[Record]) -> list[tuple[str, list[tuple[int, int, float, float]]]]:
    """By model: (reversible layers, kept, peak, median seconds)."""
    return [
        (
            record.settings["model"],
            [
                (entry["reversible"], entry["kept"], entry["peak"], statistics.median(entry["seconds"]))
                for entry in record.figures
            ],
        )
        for record in of_kind(records, KIND)
    ]


def table(records: list[Record]) -> list[list[str]]:
    rows = [["model", "reversible layers", "kept, MiB", "peak, MiB", "step, times that with none", "exact: accuracy, %",
             "meft3 as in the paper: accuracy, %"]]  # fmt: skip
    trained = _trained(records)
    models = {record.settings["model"] for record in of_kind(records, training.KIND)}
    for model, entries in _costs(records):
        for count, kept, peak, seconds in entries:
            cells = [
                percent(mean_of(trained[scheme][count], "accuracy"))
                if model in models and count in trained[scheme]
                else "-"
                for scheme in SCHEMES
            ]
            row = [model, str(count), f"{kept / MIB:.2f}", f"{peak / MIB:.2f}", f"{seconds / entries[0][3]:.2f}"]
            rows.append([*row, *cells])
    return rows


def text(records: list[Record]) -> str:
    said = []
    for model, entries in _costs(records):
        (_, kept, _, seconds), (layers, kept_all, _, seconds_all) = entries[0], entries[-1]
        said.append(
            f"{model}: with all {layers} layers reversible {kept_all / kept:.1%} of the bytes are kept that are with "
            f"none, and a step takes {seconds_all / seconds:.2f} times as long."
        )
    for scheme, by_count in _trained(records).items():
        known = {count: value for count, same in by_count.items() if (value := mean_of(same, "accuracy")) is not None}
        stopped = [str(count) for count in by_count if count not in known]
        if stopped:
            said.append(f"{scheme}: training broke off with {', '.join(stopped)} reversible layers.")
        if len(known) > 1:
            first, last = min(known), max(known)
            texts = by_count[first][0].settings["held_out"]
            said.append(
                f"{scheme}: accuracy from {first} ({known[first]:.1f} %) to {last} ({known[last]:.1f} %) reversible "
                f"layers: {change(known[first], known[last], texts)}; training losses differ by at most "
                f"{_loss_spread(by_count):.1e}."
            )
    return " ".join(said)


def _loss_spread(by_count: dict[int, list[Record]]) -> float:
    """The largest difference of any step's loss between any two of the runs."""
    curves = [same[0].figures["losses"] for same in by_count.values()]
    return max(max(step) - min(step) for step in zip(*curves, strict=False))


def draw(records: list[Record], figure: Any) -> None:
    kept_plot, time_plot, accuracy_plot = figure.subplots(1, 3)
    for model, entries in _costs(records):
        layers = entries[-1][0] or 1
        share = [count / layers for count, *_ in entries]
        kept_plot.plot(share, [kept / entries[0][1] for _, kept, _, _ in entries], marker="o", label=model)
        time_plot.plot(share, [seconds / entries[0][3] for *_, seconds in entries], marker="o", label=model)
    for scheme, by_count in _trained(records).items():
        known = {count: value for count, same in by_count.items() if (value := mean_of(same, "accuracy")) is not None}
        label = f"{SCHEMES[scheme]['variant']}, {scheme}"
        accuracy_plot.plot(list(known), list(known.values()), marker="o", label=label)
    kept_plot.set(
        ylabel="kept after forward, with none = 1", xlabel="share of layers that are reversible", ylim=(0, None)
    )
    time_plot.set(ylabel="time of a step, with none = 1", xlabel="share of layers that are reversible", ylim=(0, None))
    accuracy_plot.set(ylabel="held-out accuracy, % (MiniLM)", xlabel="reversible layers")
    for plot in (kept_plot, time_plot, accuracy_plot):
        plot.legend(fontsize="small")


FINDING = Finding("reversible_layers", "How many layers are reversible", CLAIM, jobs, table, text, draw, width=13.0)
