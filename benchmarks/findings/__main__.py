"""Measure a finding, or what of it is not there yet, and make its table, text and plot.

    python -m benchmarks.findings inversion
    python -m benchmarks.findings all --seeds 0 1
    python -m benchmarks.findings all --stored      # measures nothing
    python -m benchmarks.findings all --quick       # seconds: figures mean nothing, and go to a folder of their own

One JSON file a run, so that a sweep that was stopped goes on where it was. Under --out: <kind>/*.json, <name>.md and
<name>.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from meft_kernels.comparison.records import Record
from meft_kernels.packages import require

from . import coefficients, initialisation, inversion, reversible_layers, training, variants
from .shared import QUICK, Finding, Job, Sizes, what_was_run

# What trains nothing first.
FINDINGS: dict[str, Finding] = {
    module.FINDING.name: module.FINDING
    for module in (inversion, coefficients, initialisation, variants, reversible_layers)
}
RESULTS = Path(__file__).resolve().parents[1] / "results" / "findings"


def gather(finding: Finding, sizes: Sizes, folder: Path, *, measures: Callable[[Job], bool]) -> list[Record]:
    """Every record of the finding, in order: those that are there, and of the others those that ``measures`` wants."""
    jobs = finding.jobs(sizes)
    records = []
    for number, job in enumerate(jobs, 1):
        record = job.stored(folder)
        if record is None and measures(job):
            began = time.perf_counter()
            record = job.run(folder)
            print(f"{finding.name} {number}/{len(jobs)}: {job.label}, {time.perf_counter() - began:.0f} s", flush=True)
        if record is not None:
            records.append(record)
    return records


def publish(finding: Finding, records: list[Record], missing: int, folder: Path) -> str:
    """Write the table with its text, and the plot; returns the former."""
    require("matplotlib")
    from matplotlib.figure import Figure  # no pyplot: no global state, no display needed

    head, *rows = finding.table(records)
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    parts = [
        f"# {finding.title}",
        f"`python -m benchmarks.findings {finding.name}`",
        f"{finding.claim} {finding.text(records)}",
        what_was_run(records),
    ]
    if missing:
        parts.append(f"Unfinished: {missing} of {missing + len(records)} runs are missing.")
    document = "\n\n".join([*parts, "\n".join(lines), f"![{finding.name}]({finding.name}.png)"]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{finding.name}.md").write_text(document, encoding="utf-8")
    figure = Figure(figsize=(finding.width, 4.5), layout="constrained")
    finding.draw(records, figure)
    figure.suptitle(finding.title)
    figure.savefig(folder / f"{finding.name}.png", dpi=110)
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="+", choices=[*FINDINGS, "all"], metavar="NAME", help=f"{', '.join(FINDINGS)}, all"
    )
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that everything works")
    parser.add_argument("--stored", action="store_true", help="measure nothing, draw what is there")
    parser.add_argument("--no-training", action="store_true", help="measure only starts, streams and steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--out", type=Path, help="folder; the default is benchmarks/results/findings, findings-quick with --quick"
    )
    options = parser.parse_args(arguments)
    folder = options.out or (Path("findings-quick") if options.quick else RESULTS)
    sizes = dataclasses.replace(QUICK if options.quick else Sizes(), seeds=tuple(options.seeds))

    def measures(job: Job) -> bool:
        return not options.stored and not (options.no_training and job.kind == training.KIND)

    for name in FINDINGS if "all" in options.names else options.names:
        finding = FINDINGS[name]
        records = gather(finding, sizes, folder, measures=measures)
        if not records:
            print(f"{name}: nothing is stored under {folder}; run it without --stored")
            return 1
        print(publish(finding, records, len(finding.jobs(sizes)) - len(records), folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
