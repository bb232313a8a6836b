"""Tables and plots of a device's records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from meft_kernels.comparison.records import Record
from meft_kernels.comparison.rivals import RIVALS
from meft_kernels.comparison.tables import MIB
from meft_kernels.packages import MissingPackageError, require

from .measure import DOES_NOT_FIT
from .pieces import RUN
from .progress import Piece, Progress
from .training import ORDER

BASELINE = "lora_checkpointing"


def in_order(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """Rivals with their outcomes as the comparison lists them, whenever they were measured."""
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(record.figures["items"].items(), key=lambda item: places.get(item[0], len(places)))


def summarise(folder: Path, pieces: list[Piece], not_run: dict[str, str]) -> int:
    """Print everything, draw it, and return 1 if something in ``correctness`` is wrong."""
    records = {path.stem: Record.read(path) for path in sorted(folder.glob("*.json"))}
    ordered = {piece.name: records[piece.name] for piece in pieces if piece.name in records}
    console = Console(width=140, soft_wrap=False)
    for name, record in ordered.items():
        for table in TABLES[record.kind](name, record):
            console.print(table)
    for piece in pieces:
        if left := Progress.load(piece, folder).pending():
            everything = len(left) == len(piece.items)
            reason = f": {not_run[piece.name]}" if piece.name in not_run else ""
            console.print(f"not run: {piece.name}" + ("" if everything else f" ({', '.join(left)})") + reason)
    steps = {name: record for name, record in ordered.items() if record.kind == "gpu-step"}
    if drawn := draw(steps, folder / "steps.png"):
        console.print(drawn)
    wrong = [
        f"{name}: {item}"
        for name, record in ordered.items()
        if record.kind == "gpu-correctness"
        for item, outcome in record.figures["items"].items()
        if not outcome.get("ok")
    ]
    for each in wrong:
        console.print(f"WRONG, so no figure above can be trusted: {each}", style="bold red")
    return int(bool(wrong))


def _table(name: str, record: Record, *columns: str) -> Table:
    settings = ", ".join(f"{key} {value}" for key, value in record.settings.items())
    table = Table(title=f"{name} on {record.environment['device']}\n{settings}", title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[0], columns[-1]) else "right")
    return table


def _correctness(name: str, record: Record) -> Iterator[Table]:
    table = _table(name, record, "what", "well", "gradient error", "bound", "bytes/element", "layers exact")
    for item, found in record.figures["items"].items():
        if "layers" in found:
            cells = (
                f"{found['gradient_error']:.1e}",
                f"{found['gradient_bound']:.1e}",
                f"{found['saved_bytes_per_element']:.3f}",
                f"{found['layers']}" if found["bit_exact"] else f"first wrong: {found['first_mismatch']}",
            )
            table.add_row(item, "yes" if found["ok"] else "NO", *cells)
        else:
            table.add_row(
                item, "yes" if found.get("ok") else "NO", *["-"] * 3, found.get("reason") or "; ".join(found["wrong"])
            )
    yield table


def _kernels(name: str, record: Record) -> Iterator[Table]:
    table = _table(name, record, "op", "ms", "GB/s", "% of copy", "times faster than")
    for item, found in record.figures["items"].items():
        if "gb_per_s" not in found:
            table.add_row(item, *["-"] * 3, found.get("reason", "dry run"))
            continue
        others = ", ".join(f"{key} {value:.2f}" for key, value in found["times_faster_than"].items() if key != "fused")
        times = found["milliseconds"]["fused"]
        share = f"{100 * found['of_copy_bandwidth']:.0f}"
        table.add_row(item, f"{times['median']:.3f}", f"{found['gb_per_s']:.0f}", share, others)
    table.caption = "As called from Python: below some 0.15 ms the host's time is measured, and not the GPU's."
    yield table


def _step(name: str, record: Record) -> Iterator[Table]:
    columns = ("ms/step", "x LoRA+ckpt", "tokens/s", "kept MiB", "peak MiB", "weights MiB", "trained", "timed in")
    table = _table(name, record, "rival", *columns)
    for rival, found in in_order(record):
        title = RIVALS[rival].title
        if "peak_bytes" not in found:
            table.add_row(title, *["-"] * 7, found.get("reason", "-"))
            continue
        sizes = [f"{found[key] / MIB:,.1f}" for key in ("kept_bytes", "peak_bytes", "weights_bytes")]
        times = ("-", "-", "-")
        if "seconds" in found:
            ratio = found["over"].get(BASELINE)
            times = (
                f"{1000 * found['median_seconds']:.1f}",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{found['tokens_per_second']:,.0f}",
            )
        how = found.get("reason", found.get("how", "not timed"))
        table.add_row(title, *times, *sizes, f"{found['trainable']:,}", how)
    yield table


def _context(name: str, record: Record) -> Iterator[Table]:
    table = _table(name, record, "rival", "longest that fits", "peak MiB there", "seconds a step", "next")
    for rival, found in record.figures["items"].items():
        if not found.get("steps"):
            table.add_row(RIVALS[rival].title, *["-"] * 3, found.get("reason", "-"))
            continue
        last = max(found["steps"], key=lambda step: step["tokens"])
        stopped = found.get("reason", found.get("stopped", "cut off"))
        cells = (f"{last['tokens']:,}", f"{last['peak_bytes'] / MIB:,.0f}", f"{last['seconds']:.2f}", stopped)
        table.add_row(RIVALS[rival].title, *cells)
    yield table


TABLES = dict(zip((f"gpu-{kind}" for kind in RUN), (_correctness, _kernels, _step, _context), strict=True))


def draw(steps: dict[str, Record], path: Path) -> str | None:
    """Step time and peak relative to LoRA with checkpointing, a row of axes for each model and batch."""
    rows = {}
    for name, record in steps.items():
        peak = record.figures["items"].get(BASELINE, {}).get("peak_bytes")
        if peak:
            rows[name] = {
                rival: (found.get("over", {}).get(BASELINE), found["peak_bytes"] / peak if "peak_bytes" in found else 0)
                for rival, found in in_order(record)
                if "peak_bytes" in found or found.get("reason") == DOES_NOT_FIT
            }
    if not rows:
        return None
    try:
        require("matplotlib")
    except MissingPackageError as error:
        return f"no plot: {error}"
    from matplotlib.figure import Figure  # no pyplot: no global state, no display needed

    device = next(iter(steps.values())).environment["device"]
    heights = [1 + 0.25 * len(found) for found in rows.values()]
    figure = Figure(figsize=(11, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(f"{device}: relative to LoRA + checkpointing (less is better)")
    grid = figure.subplots(len(rows), 2, squeeze=False, height_ratios=heights)
    for axes, (name, found) in zip(grid, rows.items(), strict=True):
        titles = [RIVALS[rival].title for rival in found]
        colours = ["tab:orange" if RIVALS[rival].reversible else "tab:blue" for rival in found]
        for place, (axis, label) in enumerate(zip(axes, ("time of a step", "peak besides weights"), strict=True)):
            values = [pair[place] or 0.0 for pair in found.values()]
            bars = axis.barh(range(len(titles)), values, color=colours)
            axis.bar_label(bars, [f"{value:.2f}" if value else "none, see the table" for value in values], fontsize=7)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_yticks(range(len(titles)), titles if not place else [""] * len(titles), fontsize=7)
            axis.set(title=f"{name}: {label}", xlim=(0, 1.2 * max(values or [1]) or 1))
            axis.invert_yaxis()
    figure.savefig(path, dpi=120)
    return f"drawn: {path.name}"
