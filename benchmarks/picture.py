"""The picture of the front page: memory and time of a training step against what people use, from committed figures.

    python -m benchmarks.picture     # README's docs/picture.png

Memory is that of Llama-3.1-8B on one long text (``benchmarks/results/estimate``), time that of SmolLM2 on two CPU cores
(``benchmarks/results/step_time``). Nothing in it is typed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meft_kernels.comparison.records import Record, read_all
from meft_kernels.comparison.rivals import RIVALS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "picture.png"
OURS, THEIRS = "C0", "C7"
MODEL = "llama-3.1-8b"
SHOWN = ("lora_checkpointing", "lora_chunked", "lora_chunked_host", "lora_chunked_tiled_host", "meft")
"""Without those that keep every activation, beside which nothing else could be seen."""


def title_of(rival: str, settings: dict[str, Any]) -> str:
    """The rival's name, and for ours what is not by default."""
    extra = "".join(f", {name}={value}" for name, value in settings.items())
    return ("MEFT" + extra) if rival == "meft" else RIVALS[rival].title


def estimated_peaks(records: list[Record]) -> dict[str, float]:
    """GiB beside weights by title, loss included, the largest first."""
    peaks = {}
    for record in records:
        for row in record.figures if record.settings["model"] == MODEL else []:
            if row["rival"] in SHOWN and row.get("peak"):
                peaks[title_of(row["rival"], record.settings["settings"])] = row["peak"] / 2**30
    return dict(sorted(peaks.items(), key=lambda pair: -pair[1]))


def relative_times(record: Record) -> dict[str, float]:
    """Medians of a step by title, over ours; settings behind a rival's name are not shown."""
    medians: dict[str, float] = record.figures["medians"]
    return {title_of(name, {}): value / medians["meft"] for name, value in medians.items() if name in SHOWN}


def draw(results: Path, path: Path) -> bool:
    """Both halves side by side, as PNG.

    Returns:
        Whether there was anything to show.
    """
    from matplotlib.figure import Figure

    peaks = estimated_peaks(read_all(results / "estimate"))
    times = {record.settings["tokens"]: record for record in read_all(results / "step_time")}
    if not peaks or not times:
        return False
    record = times[max(times)]
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _bars(left, peaks, "{:.1f}")
    left.set_title("Llama-3.1-8B, 32,768 tokens: peak of a step beside weights, GiB", fontsize=9, loc="right")
    _bars(right, dict(sorted(relative_times(record).items(), key=lambda pair: -pair[1])), "{:.2f}")
    rows, tokens = record.settings["rows"], record.settings["tokens"]
    right.set_title(f"SmolLM2, {rows} x {tokens:,} tokens, CPU: time of a step / ours", fontsize=9, loc="right")
    figure.savefig(path, dpi=110)
    return True


def _bars(axes: Any, values: dict[str, float], form: str) -> None:
    bars = axes.barh(
        list(values), list(values.values()), color=[OURS if name.startswith("MEFT") else THEIRS for name in values]
    )
    axes.bar_label(bars, [form.format(value) for value in values.values()], padding=3, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_xticks([])
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main() -> None:
    if not draw(RESULTS, PICTURE):
        raise SystemExit(
            "nothing to draw: run meft-kernels estimate --json and python -m benchmarks.step_time --json first"
        )
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
