"""Write docs/RESULTS.md from the JSON files under benchmarks/results. Nothing in it is typed.

python -m benchmarks.report
python -m benchmarks.report --check     # exit code 1 if the document is not what the files give
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks import picture
from benchmarks.findings.__main__ import FINDINGS
from benchmarks.gpu.report import TABLES
from benchmarks.lora_tables import table as lora_table
from benchmarks.scaling import SETTINGS
from meft_kernels.comparison.records import Record, read_all
from meft_kernels.comparison.rivals import RIVALS
from meft_kernels.comparison.tables import CAPTION, MIB, markdown, plot, rows_by_case

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "RESULTS.md"
PLOTS = ("memory", "time")
FROM_DOCUMENT = "../benchmarks/results"


@dataclass(frozen=True)
class Section:
    """A part of the document.

    Attributes:
        folder: of its records, under benchmarks/results.
        command: what measures it.
        render: its text, from the records and their folder.
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
    """Tables of ``meft-kernels bench``, and the Pareto plots that :func:`draw` makes."""
    cases = rows_by_case(records)
    parts = [CAPTION[0].upper() + CAPTION[1:] + "."]
    for case, rows in cases.items():
        settings = next(record.settings for record in records if record.settings["case"] == case)
        sizes = (
            f"{settings['steps']} steps of {settings['batch_size']} texts of at most {settings['max_length']} tokens, "
            f"{settings['held_out']} held out, rank {settings['rank']}, {settings['dtype'].removeprefix('torch.')}"
        )
        parts += [f"### `{case}`", sizes[0].upper() + sizes[1:] + ".", markdown(rows)]
    for against in PLOTS:
        if (folder / f"{against}.png").exists():
            parts.append(f"![score against {against}]({FROM_DOCUMENT}/{folder.name}/{against}.png)")
    return "\n\n".join(parts)


def findings(records: list[Record], folder: Path) -> str:
    """What ``benchmarks.findings`` has written beside its records, a finding after the other."""
    parts = []
    for name in FINDINGS:
        written = folder / f"{name}.md"
        if not written.exists():
            parts.append(f"### {FINDINGS[name].title}\n\nNot measured yet: `python -m benchmarks.findings {name}`.")
            continue
        title, text = written.read_text(encoding="utf-8").split("\n", 1)
        text = text.replace("](", f"]({FROM_DOCUMENT}/{folder.name}/")
        parts.append(f"##{title}\n\n{text.strip()}")
    return "\n\n".join(parts)


def gpu(records: list[Record], folder: Path) -> str:
    """The tables of ``benchmarks.gpu``, as it prints them."""
    console = Console(width=140, record=True, file=io.StringIO())
    for record in records:
        for made in TABLES[record.kind](record.kind.removeprefix("gpu-"), record):
            console.print(made)
    text = "\n".join(line.rstrip() for line in console.export_text().splitlines())
    pictures = [
        f"![steps]({FROM_DOCUMENT}/{path.relative_to(folder.parent).as_posix()})"
        for path in sorted(folder.rglob("steps.png"))
    ]
    return "\n\n".join([f"```text\n{text.strip()}\n```", *pictures])


def estimator(records: list[Record], folder: Path) -> str:
    """``benchmarks.estimator``: every point beside its measurement."""
    parts = []
    for record in records:
        lines = [
            "| model | dtype | batch | rival | kept, MiB | estimated | peak with weights, MiB | estimated | error, % |"
        ]
        lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for point in record.figures["points"]:
            kept, total = point["kept"], point["total"]
            error = 100 * (total["estimated"] / total["measured"] - 1)
            sizes = [f"{value / MIB:.1f}" for pair in (kept, total) for value in (pair["measured"], pair["estimated"])]
            batch = f"{point['rows']} x {point['tokens']}"
            title = RIVALS[point["rival"]].title
            cells = [point["model"], point["dtype"], batch, title, *sizes, f"{error:+.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        worst = f"Worst error, kept bytes included: {record.figures['worst_percent']:.2f} %."
        parts += [f"{len(record.figures['points'])} points. {worst}", "\n".join(lines)]
    return "\n\n".join(parts)


def scaling(records: list[Record], folder: Path) -> str:
    """``benchmarks.scaling``: bytes an element of the hidden states, and what a further layer adds."""
    titles = {name: rival.title for name, rival in {**RIVALS, **SETTINGS}.items()}
    parts = []
    for record in records:
        study, dtype = record.settings["study"], record.settings["dtype"]
        along = {"depth": "layers", "tokens": "tokens", "width": "width"}[study]
        points = record.figures["points"]
        places = sorted({point[along] for point in points})
        tensors = ", ".join(sorted({point["tensors"] for point in points}))
        parts.append(
            f"### {study.capitalize()}, {dtype}\n\nBytes an element of the hidden states (tensors: {tensors})."
        )
        head = ["", *(f"{place:,} {along}" for place in places)]
        fits = record.figures["bytes_per_element"]
        head += ["a + b x layers"] if fits else []
        lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for what in ("kept", "peak"):
            for rival in record.settings["rivals"]:
                mine = {p[along]: p[what] / p["elements"] for p in points if p["rival"] == rival}
                cells = [f"{titles[rival]}, {what}", *(f"{mine[p]:,.1f}" if p in mine else "-" for p in places)]
                if fits:
                    a, b = fits[rival][what]
                    cells.append(f"{a:.1f} + {b:.4f}")
                lines.append(f"| {' | '.join(cells)} |")
        parts += ["\n".join(lines), f"![{study}]({FROM_DOCUMENT}/{folder.name}/{study}_{dtype}.png)"]
    return "\n\n".join(parts)


def estimates(records: list[Record], folder: Path) -> str:
    """``meft-kernels estimate --json``: a table a model and batch, ours with each of the settings asked for."""
    tables: dict[str, list[str]] = {}
    for record in records:
        what = "{model}, {dtype}, {batch} x {seq:,} tokens".format(**record.settings)
        lines = tables.setdefault(what, [])
        for row in record.figures:
            if row.get("peak") is None:
                continue
            title = picture.title_of(row["rival"], record.settings["settings"])
            sizes = (f"{row[name] / 2**30:.2f}" for name in ("kept", "peak", "host"))
            line = f"| {' | '.join([title, *sizes])} |"
            if line not in lines:
                lines.append(line)
    head = "| trained | kept, GiB | peak beside weights, GiB | on the host, GiB |\n| --- | --- | --- | --- |"
    return "\n\n".join(f"### {what}\n\n" + "\n".join([head, *lines]) for what, lines in tables.items())


def step_times(records: list[Record], folder: Path) -> str:
    """``benchmarks.step_time --json``: interleaved steps of one real model."""
    parts = []
    for record in records:
        figures = record.figures
        lines = [
            "| trained | step, s | ours / this, time | peak beside weights, MiB | ours / this, peak |",
            "| --- | --- | --- | --- | --- |",
        ]
        for rival, median in figures["medians"].items():
            name, _, settings = rival.partition(":")
            title = RIVALS[name].title + (f", {settings}" if settings else "")
            peak = figures["peak_bytes"][rival]
            share = figures["peak_bytes"]["meft"] / peak
            ratio = figures["meft_over"][rival]
            lines.append(f"| {title} | {median:.2f} | {ratio:.2f} | {peak / MIB:.1f} | {share:.2f} |")
        shape = "{model}, {dtype}, {rows} x {tokens:,} tokens, medians of {rounds} rounds".format(**record.settings)
        parts += [f"### {shape}", "\n".join(lines)]
    return "\n\n".join(parts)


def loss(records: list[Record], folder: Path) -> str:
    """``benchmarks.loss``: every way beside whole logits."""
    parts = []
    for record in records:
        shape = "{rows:,} x {width} rows, {vocabulary:,} words".format(**record.settings)
        lines = [
            "| way | time / whole logits | peak, MiB | loss off | gradient off |",
            "| --- | --- | --- | --- | --- |",
        ]
        for way, row in record.figures.items():
            errors = (f"{row[what]:.1e}" for what in ("loss_error", "gradient_error"))
            cells = [way, f"{row['over_full']:.2f}", f"{row['mib']:.1f}", *errors]
            lines.append(f"| {' | '.join(cells)} |")
        parts += [f"### {shape}, {record.settings['dtype']}", "\n".join(lines)]
    note = "Peaks are of tensors; what torch's own operator takes inside is not seen. Errors are relative, to float64."
    return "\n\n".join([*parts, note])


def lora(records: list[Record], folder: Path) -> str:
    """``benchmarks.lora_evidence``: what a LoRA that was trained reversibly is worth in the plain model."""
    head = (
        "The same LoRA, batches and rate; dropout off. Better: mean over seeds of the difference to PEFT alone on "
        "the same seed, scored in the plain PEFT model. Its paired error is that of the held-out texts, which are "
        "the same; the error that cells are held to is that of PEFT's own score. Unfinished until every row has "
        "three seeds."
    )
    return f"{head}\n\n{lora_table(records)}"


def generate(records: list[Record], folder: Path) -> str:
    """``benchmarks.generate``: tokens a second, and over the bare model's time."""
    parts = []
    for record in records:
        settings = record.settings
        lines = [
            "| batch | model | time / bare | prefill / bare | decode / bare | prefill, tokens/s | decode, tokens/s |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        notes = []
        for rows, figures in record.figures.items():
            for name in ("bare", *settings["rivals"]):
                each = figures[name]
                ratios = (f"{each[f'{what}_over']:.3f}" for what in ("seconds", "prefill", "decode"))
                speeds = f"{each['prefill_tokens_per_second']:.1f}", f"{each['decode_tokens_per_second']:.2f}"
                lines.append(f"| {' | '.join([rows, name, *ratios, *speeds])} |")
            if (found := figures.get("agreement")) is not None:
                same = "the same text" if found["same_text"] else "another text"
                notes.append(f"batch {rows}: {same} as with inference='exact', logits off by {found['logits_off']:.0e}")
        parts.append(
            f"### {settings['model']}, {settings['dtype']}, prompts of {settings['prompt']} tokens and "
            f"{settings['new']} new ones\n\nMedians of {settings['rounds']} interleaved rounds. {'; '.join(notes)}."
        )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def host(records: list[Record], folder: Path) -> str:
    """``benchmarks.host``: what a layer costs whoever launches its kernels."""
    parts = []
    for record in records:
        for case, rivals in record.figures.items():
            lines = ["| a layer | us | calls | time / LoRA + checkpointing |", "| --- | --- | --- | --- |"]
            for rival, cost in rivals.items():
                title = RIVALS[rival].title if rival in RIVALS else rival
                lines.append(f"| {title} | {cost['us']:.0f} | {cost['calls']:.0f} | {cost['over']:.2f} |")
            parts += [f"### {case}", "\n".join(lines)]
    return "\n\n".join(parts)


def draw(results: Path) -> None:
    """The plots that no command has drawn yet: those over all cases of the comparison."""
    folder = results / "comparison"
    if folder.is_dir():
        for against in PLOTS:
            plot(rows_by_case(read_all(folder)), folder, against=against)


SECTIONS = (
    Section(
        "Against what people would use instead", "comparison", "meft-kernels bench --out benchmarks/results/comparison",
        comparison,
    ),
    Section("Memory of large models, estimated", "estimate", "meft-kernels estimate --json", estimates),
    Section("Steps of a real model in turns", "step_time", "python -m benchmarks.step_time --json", step_times),
    Section("Memory against depth, tokens and width", "scaling", "python -m benchmarks.scaling", scaling),
    Section("The loss without whole logits", "loss", "python -m benchmarks.loss --out benchmarks/results/loss", loss),
    Section("A LoRA inside, taken out again", "lora", "python -m benchmarks.lora_evidence", lora),
    Section(
        "generate with adapters in the model", "generate",
        "python -m benchmarks.generate --json benchmarks/results/generate/cpu.json", generate,
    ),
    Section(
        "The host's part of a step", "host", "python -m benchmarks.host --json benchmarks/results/host/cpu.json", host
    ),
    Section("The estimator against measurement", "estimator", "python -m benchmarks.estimator", estimator),
    Section("The paper's findings, in miniature", "findings", "python -m benchmarks.findings all", findings),
    Section("On a GPU", "gpu", "python -m benchmarks.gpu", gpu),
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
    if options.check:
        if document(RESULTS) == (DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""):
            return 0
        print(f"{DOCUMENT.name} is not what the results give: python -m benchmarks.report")
        return 1
    draw(RESULTS)
    picture.draw(RESULTS, picture.PICTURE)
    made = document(RESULTS)
    DOCUMENT.write_text(made, encoding="utf-8")
    print(f"wrote {DOCUMENT.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
