"""Kept and peak bytes of a training step against depth, tokens and width: ours and others, on the same model.

    python -m benchmarks.scaling                     # all three studies, and their plots
    python -m benchmarks.scaling --studies depth --rivals meft meft_q8 --layers 4 24 --real

A random Llama (H = 512) without its head, so that only the layers count; B/elt: bytes per element of the hidden states.
Bytes are counted tensor by tensor. Points are measured with real tensors on the CPU where ``--real`` says so or, by
default, where they are small; the others with tensors without data, which run the same program under the same meter.
Where both can, both are done, and they must agree to 1 %.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from meft_kernels import MeftConfig
from meft_kernels.comparison.records import Record, read_all
from meft_kernels.comparison.rivals import RIVALS, Budget, Rival
from meft_kernels.comparison.rivals.meft import meft
from meft_kernels.estimate.step import StepBytes, measure_step, text_batch
from meft_kernels.estimate.twin import build, simulation, twin

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results" / "scaling"
STUDIES = ("depth", "tokens", "width")
LAYERS = (4, 8, 16, 24, 48, 96)
TOKENS = (256, 512, 1024, 4096, 16384)
WIDTHS = (256, 512, 1024, 2048)

SETTINGS: dict[str, Rival] = {
    "meft_q8": Rival("meft_q8", "MEFT, beta = -1/8", functools.partial(meft, beta=-1 / 8), reversible=True),
    "meft_float": Rival(
        "meft_float", "MEFT, float streams", functools.partial(meft, arithmetic="float", fraction_bits=None)
    ),
}
DEFAULT = (
    "meft", "meft_q8", "meft_host", "lora_checkpointing", "lora_chunked_host", "lora_chunked_tiled_host", "lora",
    "bottleneck",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One model and batch."""

    rival: str
    layers: int = 8
    tokens: int = 512
    width: int = 512
    rows: int = 4
    dtype: str = "bfloat16"

    def config(self) -> Any:
        return LlamaConfig(
            vocab_size=1024, hidden_size=self.width, intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.layers, num_attention_heads=self.width // 64,
            num_key_value_heads=self.width // 128, max_position_embeddings=32768, architectures=["LlamaForCausalLM"],
        )  # fmt: skip

    @property
    def elements(self) -> int:
        """Of the hidden states."""
        return self.rows * self.tokens * self.width

    @property
    def small(self) -> bool:
        """Whether a CPU does it in seconds."""
        return self.elements * self.layers * self.width <= 2**33


def measure(point: Point, *, real: bool) -> StepBytes:
    """One training step of the decoder alone."""
    rival = {**RIVALS, **SETTINGS}[point.rival]
    dtype = getattr(torch, point.dtype)
    with simulation(gpu=False):
        budget = Budget.of(build(point.config(), dtype), MeftConfig(fraction_bits=20))
    if real:
        torch.manual_seed(0)
        model = rival.prepare(build(point.config(), dtype), budget).train()
        return measure_step(model, text_batch(model, point.rows, point.tokens, CPU), loss=False)
    with simulation(gpu=False):
        model = twin(point.config(), dtype, rival, budget)
        return measure_step(model, text_batch(model, point.rows, point.tokens, CPU), loss=False)


def figures(point: Point, *, real: bool | None) -> dict[str, Any]:
    """What is kept and the peak, in bytes; real, fake, or (None) whichever can be done.

    Raises:
        RuntimeError: real and fake tensors disagree.
    """
    found: dict[str, StepBytes] = {}
    if real is not True:
        found["fake"] = measure(point, real=False)
    if real or (real is None and point.small):
        found["real"] = measure(point, real=True)
    steps = list(found.values())
    for what in ("kept", "peak", "host"):
        values = [getattr(step, what) for step in steps]
        if max(values) > 1.01 * min(values):
            raise RuntimeError(f"{point}: {what} is {values} bytes with {' and '.join(found)} tensors")
    step = steps[-1]
    counted = {"elements": point.elements, "kept": step.kept, "peak": step.peak, "host": step.host}
    return {**vars(point), "tensors": " and ".join(found), **counted}


def fit(points: list[dict[str, Any]], along: str, what: str) -> tuple[float, float]:
    """Least squares ``bytes per element = a + b * along``."""
    x = torch.tensor([float(point[along]) for point in points], dtype=torch.float64)
    y = torch.tensor([point[what] / point["elements"] for point in points], dtype=torch.float64)
    b = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return float(y.mean() - b * x.mean()), float(b)


def points_of(study: str, rival: str, dtype: str, options: Any) -> list[Point]:
    """The points of one study."""
    if study == "depth":
        return [Point(rival, layers=n, tokens=options.tokens, rows=options.rows, dtype=dtype) for n in options.layers]
    if study == "tokens":
        return [Point(rival, tokens=n, rows=1, dtype=dtype) for n in TOKENS]
    return [Point(rival, width=n, rows=1, dtype=dtype) for n in WIDTHS]


def line(point: dict[str, Any]) -> str:
    """One point, for the terminal."""
    per = {what: point[what] / point["elements"] for what in ("kept", "peak", "host")}
    return (
        f"{point['rival']:<24}{point['dtype']:<10}{point['layers']:3d} layers  {point['rows']} x {point['tokens']:<6}"
        f"H {point['width']:<5} kept {per['kept']:9.2f} B/elt   peak {per['peak']:9.1f} B/elt   "
        f"host {per['host']:7.2f} B/elt   ({point['tensors']})"
    )


def plot(folder: Path) -> list[Path]:
    """One PNG a study, from the records in ``folder``."""
    from matplotlib.figure import Figure

    written = []
    for record in read_all(folder):
        along = {"depth": "layers", "tokens": "tokens", "width": "width"}[record.settings["study"]]
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, what in zip(figure.subplots(1, 2), ("kept", "peak"), strict=True):
            for rival in record.settings["rivals"]:
                mine = [point for point in record.figures["points"] if point["rival"] == rival]
                style = "o-" if rival.startswith("meft") else "s--"
                title = {**RIVALS, **SETTINGS}[rival].title
                axes.plot([p[along] for p in mine], [p[what] / 2**20 for p in mine], style, label=title, markersize=4)
            title = f"{what}, {record.settings['dtype']}"
            axes.set(xlabel=along, ylabel="MiB", xscale="log", yscale="log", title=title)
        axes.legend(fontsize="small")
        path = folder / f"{record.settings['study']}_{record.settings['dtype']}.png"
        figure.savefig(path, dpi=90)
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="*", choices=STUDIES, default=STUDIES, help="none: only plots")
    parser.add_argument("--rivals", nargs="+", default=DEFAULT, choices=sorted({**RIVALS, **SETTINGS}))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of the study of depth")
    parser.add_argument("--real", action=argparse.BooleanOptionalAction, help="all points with real tensors, or none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for study in options.studies:
        for dtype in options.dtypes:
            points, fits = [], {}
            for rival in options.rivals:
                mine = []
                for point in points_of(study, rival, dtype, options):
                    mine.append(figures(point, real=options.real))
                    print(line(mine[-1]), flush=True)
                points += mine
                along = {"depth": "layers", "tokens": "tokens", "width": "width"}[study]
                if study == "depth" and len(mine) > 1:
                    fits[rival] = {what: fit(mine, along, what) for what in ("kept", "peak")}
                    for what, (a, b) in fits[rival].items():
                        print(f"{rival:<20}{what} = {a:.2f} + {b:.4f} B/elt a layer", flush=True)
            settings = {"study": study, "dtype": dtype, "rivals": list(options.rivals)}
            record = Record.now("scaling", settings, {"points": points, "bytes_per_element": fits}, CPU)
            record.write(options.out / f"{study}_{dtype}.json")
    for path in plot(options.out):
        print(f"plotted {path.name}")


if __name__ == "__main__":
    main()
