"""The three couplings side by side: exact, as in the paper, and as in the paper with plain autograd's gradients."""

from __future__ import annotations

import statistics
from typing import Any

from meft_kernels.comparison.records import Record
from meft_kernels.comparison.tables import smooth

from . import training
from .shared import PAPER, VARIANTS, Finding, Job, Sizes, change, mean_of, percent

SCHEMES: dict[str, dict[str, Any]] = {
    "exact": {},
    "paper": PAPER,
    # Tells what the moved start does from what the inexact inverse does.
    "paper, plain autograd": {**PAPER, "engine": "autograd"},
}
CLAIM = (
    "The paper has three couplings, in float arithmetic, whose gradients are those of rebuilt inputs; under plain "
    "autograd the same model has the right ones. Its coefficients, read-out and adapters' start are part of its scheme "
    "here."
)
_STYLES = {"exact": "-", "paper": "--", "paper, plain autograd": ":"}


def jobs(sizes: Sizes) -> list[Job]:
    return [
        training.job(sizes, f"{variant}-{name.replace(',', '').replace(' ', '-')}", "meft", seed, config(variant, name))
        for seed in sizes.seeds
        for name in SCHEMES
        for variant in VARIANTS
    ]


def config(variant: str, scheme: str) -> dict[str, Any]:
    return {**SCHEMES[scheme], "variant": variant}


def _runs(records: list[Record], variant: str, scheme: str) -> list[Record]:
    wanted = config(variant, scheme)
    found = training.runs(records, "meft", **wanted)
    return [record for record in found if record.settings["config"].get("engine") == wanted.get("engine")
            and record.settings["config"].get("arithmetic") == wanted.get("arithmetic")]  # fmt: skip


def table(records: list[Record]) -> list[list[str]]:
    rows = [
        ["variant", "streams", "start's distance", "accuracy, %", "last quarter's loss", "bits an element and layer",
         "kept, MiB", "seeds"],
    ]  # fmt: skip
    for scheme in SCHEMES:
        for variant in VARIANTS:
            same = _runs(records, variant, scheme)
            if not same:
                continue
            loss = mean_of(same, "loss_at_the_end")
            rows.append(
                [
                    variant,
                    scheme,
                    f"{mean_of(same, 'start_distance'):.3f}",
                    percent(mean_of(same, "accuracy")),
                    "-" if loss is None else f"{loss:.3f}",
                    "all kept" if "autograd" in scheme else str(same[0].figures["bits_per_element"]),
                    f"{statistics.mean(record.figures['kept_bytes'] for record in same) / 2**20:.1f}",
                    str(len(same)),
                ]
            )
    return rows


def text(records: list[Record]) -> str:
    said = []
    for variant in VARIANTS:
        groups = {scheme: _runs(records, variant, scheme) for scheme in SCHEMES}
        known = {scheme: mean_of(same, "accuracy") for scheme, same in groups.items() if same}
        words = ", ".join(f"{scheme} {percent(value)}" for scheme, value in known.items())
        line = f"{variant}: held-out accuracy {words}"
        for before, after in (("exact", "paper"), ("paper, plain autograd", "paper")):
            first, second = known.get(before), known.get(after)
            if first is not None and second is not None:
                texts = groups[before][0].settings["held_out"] * min(len(groups[before]), len(groups[after]))
                line += f"; from {before} to {after}: {change(first, second, texts)}"
        said.append(line + ".")
    return " ".join(said)


def draw(records: list[Record], figure: Any) -> None:
    losses, bars = figure.subplots(1, 2)
    colours = dict(zip(VARIANTS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for place, scheme in enumerate(SCHEMES):
        for offset, variant in enumerate(VARIANTS):
            same = _runs(records, variant, scheme)
            if not same:
                continue
            steps = min(len(record.figures["losses"]) for record in same)
            curve = [statistics.fmean(record.figures["losses"][i] for record in same) for i in range(steps)]
            look = {"color": colours[variant], "linestyle": _STYLES[scheme]}
            losses.plot(smooth(curve, max(1, steps // 8)), label=f"{variant}, {scheme}", **look)
            if (accuracy := mean_of(same, "accuracy")) is not None:
                drawn = bars.bar(place + (offset - 1) * 0.27, accuracy, 0.25, color=colours[variant])
                bars.bar_label(drawn, fmt="%.1f")
    losses.set(xlabel="step", ylabel="training loss, running mean")
    losses.legend(fontsize="x-small", handlelength=4)
    bars.set_xticks(range(len(SCHEMES)), [name.replace(", ", ",\n") for name in SCHEMES])
    bars.set(ylabel="held-out accuracy, %", ylim=(45, None))


FINDING = Finding("variants", "meft1, meft2, meft3 side by side", CLAIM, jobs, table, text, draw)
