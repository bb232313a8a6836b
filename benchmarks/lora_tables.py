"""Tables of ``benchmarks.lora_evidence``, from its records alone."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from meft_kernels.comparison.records import Record

KIND = "lora-evidence"
BEST = "plain"
ALLOWED = {"%": 0.5, "nats": 0.01}
"""How far below PEFT alone the default may come out."""


@dataclass(frozen=True)
class Method:
    """One way to train the LoRA.

    Attributes:
        title: for tables.
        config: settings of ``patch`` beside ``adapters="none"``; None for PEFT alone.
    """

    title: str
    config: dict[str, Any] | None = None


METHODS = {
    BEST: Method("PEFT, checkpointing"),
    "default": Method("reversible, -1/256 (default)", {}),
    "beta64": Method("reversible, -1/64", {"beta": -1 / 64}),
    "beta8": Method("reversible, -1/8", {"beta": -1 / 8}),
    "moved": Method("PEFT, A moved by 1 %"),
}


@dataclass(frozen=True)
class Difference:
    """One cell against PEFT alone on the same seed, in points or nats; positive is better."""

    better: float
    error: float
    """Standard error of PEFT's own score, from the number of held-out texts."""
    paired: float
    """Standard error of the difference, whose texts are the same."""

    @property
    def within(self) -> bool:
        """Within one standard error of PEFT's score."""
        return abs(self.better) <= self.error


def difference(record: Record, best: Record, what: str = "unpatched") -> Difference:
    """Of the score in the plain model, or of another one of the cell."""
    mine, theirs = record.figures[what], best.figures["unpatched"]
    better = mine["score"] - theirs["score"]
    pairs = list(zip(mine["texts"], theirs["texts"], strict=True))
    if record.figures["higher_is_better"]:
        steps = [int(a) - int(b) for a, b in pairs]
        mean = statistics.fmean(steps)
        paired = 100 * math.sqrt(sum((step - mean) ** 2 for step in steps)) / len(steps)
        return Difference(better, theirs["error"], paired)
    tokens = sum(b[1] for _, b in pairs)
    spread = math.sqrt(sum((a[0] - b[0] - better * b[1]) ** 2 for a, b in pairs))
    return Difference(-better, theirs["error"], spread / tokens)


def _cells(records: list[Record]) -> dict[tuple[str, str, int], Record]:
    return {(r.settings["case"], r.settings["method"], r.settings["seed"]): r for r in records if r.kind == KIND}


def _mean(values: list[float], digits: int, sign: str = "") -> str:
    """The mean, and the standard deviation between seeds."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{spread}"


def _row(method: str, mine: list[Record], against: list[Difference], unit: str) -> list[str]:
    digits = 2 if unit == "%" else 4
    scores = {
        what: [each.figures[what]["score"] for each in mine if what in each.figures]
        for what in ("patched", "unpatched", "merged")
    }
    moves = [
        _moves([each.figures[what] for each in mine if what in each.figures])
        for what in ("moved_before", "moved_after")
    ]
    cells = [METHODS[method].title, str(len(mine)), *(_mean(values, digits) for values in scores.values())]
    if method == BEST:
        return [*cells, "-", "-", *moves]
    worst = min((each.better for each in against), default=math.nan)
    within = f"{sum(each.within for each in against)} of {len(against)}"
    better = _mean([each.better for each in against], digits, "+")
    paired = statistics.fmean(each.paired for each in against) if against else math.nan
    return [*cells, f"{better} (paired error {paired:.{digits}f}; worst {worst:+.{digits}f})", within, *moves]


def _moves(moves: list[dict[str, float]]) -> str:
    if not moves:
        return "-"
    relative, divergence, agree = (statistics.fmean(m[w] for m in moves) for w in ("relative", "divergence", "agree"))
    return f"{100 * relative:.2f} %, {divergence:.0e} nats, {100 * agree:.1f} % agree"


HEAD = [
    "trained", "seeds", "as trained", "unpatched", "merged", "unpatched, better than PEFT by", "within one error",
    "logits moved by unpatch before training", "and after",
]  # fmt: skip


def verdict(records: list[Record]) -> str:
    """Whether every cell is within one standard error of PEFT's, and the default's never further below than allowed."""
    cells = _cells(records)
    outside, below, counted = [], [], 0
    for (case, method, seed), record in sorted(cells.items()):
        best = cells.get((case, BEST, seed))
        if best is None or METHODS[method].config is None:
            continue
        counted += 1
        found = difference(record, best)
        if not found.within:
            outside.append(f"{case} {method} seed {seed} ({found.better:+.3f}, error {found.error:.3f})")
        if method == "default" and found.better < -ALLOWED[record.figures["unit"]]:
            below.append(f"{case} seed {seed} ({found.better:+.3f}, paired error {found.paired:.3f})")
    return (
        f"{counted - len(outside)} of {counted} reversible cells within one standard error of PEFT's score"
        f"{': not ' + ', '.join(outside) if outside else ''}. More than {ALLOWED['%']} points or {ALLOWED['nats']} "
        f"nats below it at the default coefficient: {', '.join(below) or 'none'}."
    )


def table(records: list[Record]) -> str:
    """Markdown: a table a case, and the verdict over all of them."""
    cells = _cells(records)
    parts = []
    for case in dict.fromkeys(case for case, _, _ in cells):
        of_case = [record for (c, _, _), record in cells.items() if c == case]
        settings, unit = of_case[0].settings, of_case[0].figures["unit"]
        parts.append(
            f"### `{case}`\n\n{settings['steps']} steps of {settings['batch_size']} texts of at most "
            f"{settings['max_length']} tokens, rate {settings['lora_lr']:g}, {settings['held_out']} held out, LoRA "
            f"r = {settings['rank']} in all linear layers, float32. Scores in {unit}."
        )
        lines = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
        for method in METHODS:
            seeds = sorted(seed for c, m, seed in cells if (c, m) == (case, method))
            mine = [cells[case, method, seed] for seed in seeds]
            if not mine:
                continue
            pairs = [(cells[case, method, seed], cells.get((case, BEST, seed))) for seed in seeds]
            against = [difference(record, best) for record, best in pairs if best is not None]
            lines.append(f"| {' | '.join(_row(method, mine, against, unit))} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, verdict(records)])
