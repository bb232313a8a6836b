"""Training from starts moved away from the pretrained model: does a start further off end worse?"""

from __future__ import annotations

from typing import Any

from meft_kernels.comparison.records import Record
from meft_kernels.comparison.rivals import RIVALS

from . import training
from .shared import Finding, Job, Sizes, change, mean_of, percent

CLAIM = "The paper: methods that train few parameters must start from the pretrained model's own outputs."
AMOUNTS: dict[str, tuple[float, ...]] = {
    "lora": (0.0, 0.01, 0.03, 0.1, 0.3),
    "ia3": (0.0, 0.03, 0.1, 0.3, 1.0),
    "meft": (0.0, 0.01, 0.03, 0.1, 0.3),
}
"""Std of the noise: on LoRA's B, on (IA)3's factors, of our adapters' up-projections."""


def jobs(sizes: Sizes) -> list[Job]:
    """The two ends first, should a sweep be stopped: of every method with one seed, then of LoRA with the others."""
    order = [0, *range(len(AMOUNTS["lora"]) - 1, 0, -1)][: sizes.amounts]
    made = [
        _job(sizes, method, AMOUNTS[method][i], seed) for seed in sizes.seeds[:1] for i in order for method in AMOUNTS
    ]
    return made + [_job(sizes, "lora", AMOUNTS["lora"][i], seed) for seed in sizes.seeds[1:] for i in order]


def _job(sizes: Sizes, method: str, amount: float, seed: int) -> Job:
    config: dict[str, Any] = {"variant": "meft2"}
    label = f"{method}-moved-{amount:g}"
    if method != "meft":
        return training.job(sizes, label, method, seed, config, moved=amount)
    if amount:  # our adapters have a setting for it
        config["up_init_std"] = amount
    return training.job(sizes, label, method, seed, config)


def amount_of(record: Record) -> float:
    if record.settings["method"] == "meft":
        return float(record.settings["config"].get("up_init_std", 0.0))
    return float(record.settings["moved"])


def _points(records: list[Record], method: str) -> list[tuple[float, list[Record]]]:
    """By amount, the runs of all seeds."""
    mine = [record for record in records if record.settings["method"] == method]
    return [
        (amount, [record for record in mine if amount_of(record) == amount])
        for amount in sorted({amount_of(record) for record in mine})
    ]


def table(records: list[Record]) -> list[list[str]]:
    rows = [["method", "noise", "start's distance", "accuracy, %", "last quarter's loss", "seeds"]]
    for method in AMOUNTS:
        for amount, same in _points(records, method):
            loss = mean_of(same, "loss_at_the_end")
            rows.append(
                [
                    RIVALS[method].title,
                    f"{amount:g}",
                    f"{mean_of(same, 'start_distance'):.3f}",
                    percent(mean_of(same, "accuracy")),
                    "-" if loss is None else f"{loss:.3f}",
                    str(len(same)),
                ]
            )
    return rows


def text(records: list[Record]) -> str:
    said = []
    for method in AMOUNTS:
        points = _points(records, method)
        ends = [(amount, same, mean_of(same, "accuracy")) for amount, same in points]
        known = [(amount, same, accuracy) for amount, same, accuracy in ends if accuracy is not None]
        stopped = [f"{amount:g}" for amount, _, accuracy in ends if accuracy is None]
        if stopped:
            said.append(f"{RIVALS[method].title} did not train to the end from noise of {', '.join(stopped)}.")
        if len(known) < 2 or known[0][0] != 0:
            continue
        (_, own, before), (_, far, after) = known[0], known[-1]
        texts = own[0].settings["held_out"] * min(len(own), len(far))
        said.append(
            f"{RIVALS[method].title}: from its own start ({before:.1f} %, {mean_of(own, 'start_distance'):.3f} from "
            f"the pretrained model's last hidden states) to the one furthest off ({after:.1f} %, "
            f"{mean_of(far, 'start_distance'):.3f}) accuracy {_as_verb(change(before, after, texts))}."
        )
    return " ".join(said)


def _as_verb(words: str) -> str:
    return f"shows {words}" if words.startswith("no ") else words


def draw(records: list[Record], figure: Any) -> None:
    plot = figure.subplots(1, 1)
    for method in AMOUNTS:
        points = _points(records, method)
        known = [
            (mean_of(same, "start_distance"), accuracy)
            for _, same in points
            if (accuracy := mean_of(same, "accuracy")) is not None
        ]
        if not known:
            continue
        (line,) = plot.plot(*zip(*known, strict=True), marker="o", label=RIVALS[method].title)
        each = [(r.figures["start_distance"], r.figures["accuracy"]) for _, same in points for r in same]
        plot.plot(
            *zip(*[pair for pair in each if None not in pair], strict=True), ".", color=line.get_color(), alpha=0.5
        )
    plot.set(
        xlabel="start's distance from the pretrained model (relative, last hidden states)",
        ylabel="held-out accuracy after training, %",
    )
    plot.set_xscale("symlog", linthresh=1e-2)
    plot.legend()


FINDING = Finding(
    "initialisation", "The start's distance and what is learnt from it", CLAIM, jobs, table, text, draw, width=7.5
)
