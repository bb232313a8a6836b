"""Float streams, rebuilt layer by layer on a real language model, and exact ones, which come back as they were."""

from __future__ import annotations

from typing import Any

from meft_kernels.comparison.records import Record

from . import streams
from .shared import PAPER, VARIANTS, Finding, Job, Sizes, of_kind, power

SCHEMES: dict[str, dict[str, Any]] = {
    "paper": PAPER,  # lam, beta 0.1
    "centered, float": {"arithmetic": "float"},  # -1/8
    "exact": {},
}
CLAIM = (
    "The paper: undoing a layer divides by lam and beta, which costs precision, so that deep models make only some of "
    "their layers reversible."
)
DEPTHS = (1, 2, 4, 6, 8, 12, 20, 30)
USELESS = 0.01
"""A rebuilt stream that is further off than this gives gradients that are."""
_FLOOR, _CEILING = 1e-9, 1e6  # of the plot


def jobs(sizes: Sizes) -> list[Job]:
    return [
        streams.inversion_job(
            sizes, variant, dtype, {name: {**scheme, "variant": variant} for name, scheme in SCHEMES.items()}
        )
        for dtype in sizes.dtypes
        for variant in VARIANTS
        if dtype != "float16" or variant == VARIANTS[0]  # minutes a pass on a CPU
    ]


def _lines(records: list[Record]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(dtype, variant, scheme, figures)."""
    return [
        (record.settings["dtype"], record.settings["configs"][scheme]["variant"], scheme, figures)
        for record in of_kind(records, streams.INVERSION)
        for scheme, figures in record.figures.items()
    ]


def depth_within(error: list[float | None], bound: float = USELESS) -> int:
    """How many layers can be undone before the first error beyond ``bound``."""
    for undone, value in enumerate(error):
        if value is None or value > bound:
            return undone
    return len(error)


def _below(error: list[float | None], bound: float) -> list[float]:
    """The errors before the first that is beyond ``bound``, or no number."""
    return [value for value in error[: depth_within(error, bound)] if value is not None]


def growth(error: list[float | None]) -> float | None:
    """By what a layer multiplies the error, on (geometric) average, as long as it is less than the stream itself."""
    small = _below(error, 1.0)
    return (small[-1] / small[0]) ** (1 / (len(small) - 1)) if len(small) > 1 and small[0] else None


def table(records: list[Record]) -> list[list[str]]:
    lines = _lines(records)
    deepest = max((len(figures["error"]) for *_, figures in lines), default=0)
    depths = [depth for depth in DEPTHS if depth <= deepest]
    rows = [
        [
            "dtype",
            "variant",
            "streams",
            *(f"{depth} undone" for depth in depths),
            "times a layer",
            f"layers within {USELESS:.0%}",
        ]
    ]
    for dtype, variant, scheme, figures in lines:
        error = figures["error"]
        cells = [power(error[depth - 1]) if depth <= len(error) else "-" for depth in depths]
        ending = "no forward" if figures["stopped"] else f"{depth_within(error)} of {len(error)}"
        factor = growth(error)
        rows.append([dtype, variant, scheme, *cells, "-" if factor is None else f"{factor:.1f}", ending])
    return rows


def text(records: list[Record]) -> str:
    lines = _lines(records)
    exact = [figures for *_, scheme, figures in lines if scheme == "exact"]
    equal = sum(figures["equal"] for figures in exact)
    said = [f"Exact streams come back equal (torch.equal, every layer) in {equal} of {len(exact)} cases."]
    factors = [factor for *_, figures in lines if (factor := growth(figures["error"])) is not None]
    if factors:
        said.append(f"In float streams a layer multiplies the error by {min(factors):.0f} to {max(factors):.0f}.")
    for dtype in dict.fromkeys(line[0] for line in lines):
        parts = []
        for scheme in list(SCHEMES)[:2]:
            found = [
                (variant, depth_within(figures["error"]), len(figures["error"]))
                for kind, variant, name, figures in lines
                if (kind, name) == (dtype, scheme) and not figures["stopped"]
            ]
            depths = ", ".join(f"{variant} {depth}" for variant, depth, _ in found)
            parts.append(f"{scheme} {depths} of {found[0][2]} layers" if found else f"{scheme}: the forward overflows")
        said.append(f"In {dtype}, float streams stay within {USELESS:.0%} for: {'; '.join(parts)}.")
    broken = [line[:3] for line in lines if line[3]["stopped"]]
    if broken:
        said.append("No forward at all (overflow): " + "; ".join(", ".join(names) for names in broken) + ".")
    return " ".join(said)


def draw(records: list[Record], figure: Any) -> None:
    lines = _lines(records)
    dtypes = list(dict.fromkeys(line[0] for line in lines))
    plots = figure.subplots(1, len(dtypes), sharey=True, sharex=True, squeeze=False)[0]
    colours = dict(zip(VARIANTS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    styles = {"paper": "-", "centered, float": "--", "exact": ":"}
    for plot, dtype in zip(plots, dtypes, strict=True):
        for kind, variant, scheme, figures in lines:
            if kind != dtype or not figures["error"]:
                continue
            values = [max(value, _FLOOR) for value in _below(figures["error"], _CEILING)]
            plot.plot(
                range(1, len(values) + 1), values, styles[scheme], color=colours[variant], label=f"{variant}, {scheme}"
            )
        plot.axhline(USELESS, color="grey", linewidth=0.6)
        plot.set(yscale="log", ylim=(_FLOOR / 2, _CEILING * 2), xlabel="layers undone", title=dtype)
    plots[0].set_ylabel(f"relative error of the rebuilt streams\n(0 drawn at {_FLOOR:.0e})")
    plots[0].legend(fontsize="x-small", handlelength=4)


FINDING = Finding(
    "inversion", "What of the streams comes back, by depth and dtype", CLAIM, jobs, table, text, draw, width=13.0
)
