"""lam and beta from 1 to 1/256: how far the start is, what float streams lose, what is learnt, what exact ones keep."""

from __future__ import annotations

import statistics
from typing import Any

from meft_kernels.comparison.records import Record

from . import streams, training
from .inversion import depth_within
from .shared import (
    VARIANTS,
    Finding,
    Job,
    Sizes,
    change,
    coefficients,
    fraction,
    mean_of,
    of_kind,
    percent,
)

CLAIM = "The paper: small coefficients start close to the pretrained model and cost the float inverse its precision."
COUPLINGS: dict[str, tuple[int, dict[str, Any]]] = {
    # The sign of ours, and the read-out that goes with each.
    "centered": (-1, {"coupling": "centered", "readout": "state"}),
    "paper": (1, {"coupling": "paper", "readout": "mean"}),
}


def _config(variant: str, coupling: str, q: int) -> dict[str, Any]:
    sign, settings = COUPLINGS[coupling]
    return {"variant": variant, **settings, **coefficients(variant, q, sign=sign)}


def trained_config(variant: str, coupling: str, q: int) -> dict[str, Any]:
    """For a training: without what is the default anyway, so that a run which others have made too is made once."""
    config = _config(variant, coupling, q)
    if coupling == "centered":
        del config["coupling"], config["readout"]
        if q == {"meft1": 256, "meft2": 256, "meft3": 64}[variant]:
            return {"variant": variant}
    return config


def jobs(sizes: Sizes) -> list[Job]:
    """What trains nothing first."""
    made = []
    for variant in VARIANTS:
        for coupling in COUPLINGS:
            configs = {str(q): _config(variant, coupling, q) for q in sizes.coefficients}
            label = f"{variant}-{coupling}"
            made += [
                streams.start_job(sizes, label, name, configs) for name in (sizes.classifier, sizes.language_model)
            ]
            inexact = {q: {**config, "arithmetic": "float"} for q, config in configs.items()}
            made += [
                streams.inversion_job(sizes, f"by-coefficient-{label}", dtype, inexact)
                for dtype in sizes.dtypes
                if dtype != "float16"  # slow on a CPU, and between the other two
            ]
    for seed in sizes.seeds:
        for q in sizes.trained_coefficients:
            for coupling in COUPLINGS:
                for variant in VARIANTS:
                    config = trained_config(variant, coupling, q)
                    made.append(training.job(sizes, f"{variant}-{coupling}-{q}", "meft", seed, config))
    unique = {(job.kind, job.label): job for job in made}  # the quick sizes have one model in both places
    return list(unique.values())


def _described(record: Record) -> tuple[str, str]:
    """(variant, coupling) of a record with many configs."""
    config = next(iter(record.settings["configs"].values()))
    return config["variant"], config["coupling"]


def _starts(records: list[Record], variant: str, coupling: str) -> dict[str, dict[int, tuple[float | None, int]]]:
    """By unit, then q: mean change (None where the streams overflowed), and bits that exact streams keep."""
    return {
        record.figures["unit"]: {
            int(q): (statistics.mean(found["changes"]) if found["changes"] else None, found["bits"])
            for q, found in record.figures["configs"].items()
        }
        for record in of_kind(records, streams.START)
        if _described(record) == (variant, coupling)
    }


def _written(moved: float | None, form: str) -> str:
    return "overflow" if moved is None else format(moved, form)


def _depths(records: list[Record], variant: str, coupling: str, dtype: str) -> dict[int, int | None]:
    """By q: layers of float streams that can be undone within one percent; None where the forward overflows."""
    return {
        int(q): None if found["stopped"] else depth_within(found["error"])
        for record in of_kind(records, streams.INVERSION)
        if _described(record) == (variant, coupling) and record.settings["dtype"] == dtype
        for q, found in record.figures.items()
    }


def _trained(records: list[Record], variant: str, coupling: str) -> dict[int, list[Record]]:
    """By q, one run a seed."""
    wanted = {q: trained_config(variant, coupling, q) for q in Sizes().coefficients}
    found = {}
    for q, config in wanted.items():
        same = [
            record
            for record in of_kind(records, training.KIND)
            if {name: value for name, value in record.settings["config"].items() if name not in _OF_ALL} == config
        ]
        if same:
            found[q] = same
    return found


def _accuracy(records: list[Record], variant: str, coupling: str) -> dict[int, float]:
    """By q, of trainings that came to their end."""
    means = {q: mean_of(same, "accuracy") for q, same in _trained(records, variant, coupling).items()}
    return {q: value for q, value in means.items() if value is not None}


_OF_ALL = ("rank", "down_init_std")  # the recipe's, in every training


def table(records: list[Record]) -> list[list[str]]:
    rows = [
        ["variant", "coupling", "lam, beta", "bits kept", "hidden states moved", "loss moved, nats",
         "float32 layers within 1 %", "bfloat16", "accuracy, %"],
    ]  # fmt: skip
    for variant in VARIANTS:
        for coupling in COUPLINGS:
            starts = _starts(records, variant, coupling)
            moved, nats = starts.get("relative", {}), starts.get("nats", {})
            depths = [_depths(records, variant, coupling, dtype) for dtype in ("float32", "bfloat16")]
            accuracy = {q: mean_of(same, "accuracy") for q, same in _trained(records, variant, coupling).items()}
            for q in sorted({*moved, *nats, *depths[0], *accuracy}):
                bits = (moved or nats).get(q, (0.0, "-"))[1]
                rows.append(
                    [
                        variant,
                        coupling,
                        f"{'-' if coupling == 'centered' else ''}{fraction(q)}",
                        str(bits),
                        _written(moved[q][0], ".3f") if q in moved else "-",
                        _written(nats[q][0], "+.3f") if q in nats else "-",
                        *(
                            "-" if q not in found else "overflow" if found[q] is None else str(found[q])
                            for found in depths
                        ),
                        percent(accuracy[q]) if q in accuracy else "-",
                    ]
                )
    return rows


def text(records: list[Record]) -> str:
    return " ".join(_sentence(records, variant, coupling) for coupling in COUPLINGS for variant in VARIANTS)


def _sentence(records: list[Record], variant: str, coupling: str) -> str:
    """From the largest coefficient to the smallest."""
    parts = []
    for unit, starts in _starts(records, variant, coupling).items():
        (one, _), (least, bits) = starts[min(starts)], starts[max(starts)]
        what, form = ("loss", "+.3f") if unit == "nats" else ("last hidden states", ".3f")
        moved = f"{_written(one, form)} to {_written(least, form)}"
        parts.append(f"the {what} moved by {moved}" + (" nats" if unit == "nats" else f", bits kept 0 to {bits}"))
    for dtype in ("float32", "bfloat16"):
        if depths := _depths(records, variant, coupling, dtype):
            found = ["none (the forward overflows)" if depths[q] is None else depths[q] for q in sorted(depths)]
            parts.append(f"{dtype} layers that can be undone {found[0]} to {found[-1]}")
    accuracy, trained = _accuracy(records, variant, coupling), _trained(records, variant, coupling)
    if len(accuracy) > 1:
        first, last = min(accuracy), max(accuracy)
        seeds = min(len(trained[first]), len(trained[last]))
        texts = int(trained[first][0].settings["held_out"]) * seeds
        parts.append(
            f"accuracy {accuracy[first]:.1f} % at {fraction(first)}, {accuracy[last]:.1f} % at {fraction(last)}: "
            f"{change(accuracy[first], accuracy[last], texts)}"
        )
    everything = {q for starts in _starts(records, variant, coupling).values() for q in starts}
    if not everything:
        return f"{variant}, {coupling}: not measured yet."
    return (
        f"{variant}, {coupling}, from {fraction(min(everything))} to {fraction(max(everything))}: {'; '.join(parts)}."
    )


def draw(records: list[Record], figure: Any) -> None:
    starts_plot, depth_plot, accuracy_plot = figure.subplots(1, 3)
    colours = dict(zip(VARIANTS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for variant in VARIANTS:
        for coupling, style in (("centered", "-"), ("paper", "--")):
            look = {"color": colours[variant], "linestyle": style, "marker": ".", "label": f"{variant}, {coupling}"}
            moved = _starts(records, variant, coupling).get("relative", {})
            known = {q: value for q, (value, _) in moved.items() if value is not None}
            starts_plot.plot([1 / q for q in known], list(known.values()), **look)
            depths = {q: v for q, v in _depths(records, variant, coupling, "float32").items() if v is not None}
            depth_plot.plot([1 / q for q in depths], list(depths.values()), **look)
            accuracy = _accuracy(records, variant, coupling)
            accuracy_plot.plot([1 / q for q in accuracy], list(accuracy.values()), **look)
    for plot in (starts_plot, depth_plot, accuracy_plot):
        plot.set(xscale="log", xlabel="|lam|, |beta|")
    starts_plot.set(yscale="log", ylabel="relative change of the last hidden states", title="start (MiniLM)")
    depth_plot.set(ylabel="layers undone within 1 %", title="float32 streams (SmolLM2)")
    accuracy_plot.set(ylabel="held-out accuracy, %", title="after training, exact streams (MiniLM)")
    starts_plot.legend(fontsize="x-small", handlelength=4)


FINDING = Finding("coefficients", "lam and beta", CLAIM, jobs, table, text, draw, width=15.0)
