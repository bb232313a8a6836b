"""Write docs/RESULTS.md from the JSON files under benchmarks/results. Nothing in it is typed.

python -m benchmarks.report
python -m benchmarks.report --check     # exit code 1 if the document is not what the files give
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from meft_kernels.comparison.records import Record, read_all
from meft_kernels.comparison.tables import CAPTION, markdown, plot, rows_by_case

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "RESULTS.md"
FROM_DOCUMENT = "../benchmarks/results"


@dataclass(frozen=True)
class Section:
    """A part of the document.

    Attributes:
        folder: of its records, under benchmarks/results.
        command: what measures it.
        render: its text, from the records and the folder; it may draw plots into the folder.
    """

    title: str
    folder: str
    command: str
    render: Callable[[list[Record], Path], str]

    def text(self, results: Path) -> str:
        folder = results / self.folder
        records = read_all(folder) if folder.is_dir() else []
        if not records:
            return f"## {self.title}\n\nNot measured yet: `{self.command}`."
        return f"## {self.title}\n\n{self.render(records, folder)}\n\n{provenance(records)}"


def provenance(records: Sequence[Record]) -> str:
    """Commands, versions, devices and dates of these records."""

    def all_of(values: list[str]) -> list[str]:
        return sorted({value for value in values if value})

    commands = "".join(f"\n    {command}" for command in all_of([record.command for record in records]))
    versions = all_of(
        [
            ", ".join(f"{name} {value}" for name, value in record.environment.items() if name != "device")
            for record in records
        ]
    )
    devices = all_of([record.environment.get("device", "") for record in records])
    dates = all_of([record.date for record in records])
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"Measured {when} on {'; '.join(devices)}, with {'; '.join(versions)}, by\n{commands}"


def comparison(records: list[Record], folder: Path) -> str:
    """Tables and Pareto plots of ``meft-kernels bench``."""
    cases = rows_by_case(records)
    parts = [CAPTION[0].upper() + CAPTION[1:] + "."]
    for case, rows in cases.items():
        settings = next(record.settings for record in records if record.settings["case"] == case)
        sizes = (
            f"{settings['steps']} steps of {settings['batch_size']} texts of at most {settings['max_length']} tokens, "
            f"{settings['held_out']} held out, rank {settings['rank']}, {settings['dtype'].removeprefix('torch.')}"
        )
        parts += [f"### `{case}`", sizes[0].upper() + sizes[1:] + ".", markdown(rows)]
    for against in ("memory", "time"):
        if plot(cases, folder, against=against):
            parts.append(f"![score against {against}]({FROM_DOCUMENT}/{folder.name}/{against}.png)")
    return "\n\n".join(parts)


SECTIONS = (
    Section(
        "Against what people would use instead", "comparison", "meft-kernels bench --out benchmarks/results/comparison",
        comparison,
    ),
)  # fmt: skip


def document(results: Path) -> str:
    """The whole document."""
    head = (
        "# Results\n\nWritten by `python -m benchmarks.report` from the JSON files under `benchmarks/results`; every "
        "figure has its command, versions, device and date. What is not measured yet says so."
    )
    return "\n\n".join([head, *(section.text(results) for section in SECTIONS)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; tell whether the document is up to date")
    options = parser.parse_args(arguments)
    made = document(RESULTS)
    if options.check:
        if made == (DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""):
            return 0
        print(f"{DOCUMENT.name} is not what the results give: python -m benchmarks.report")
        return 1
    DOCUMENT.write_text(made, encoding="utf-8")
    print(f"wrote {DOCUMENT.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
