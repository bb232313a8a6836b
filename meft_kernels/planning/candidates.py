"""Which settings are tried, in the order of their time on a large GPU; ``costs`` says why in this order."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..architectures import find_architecture
from ..config import MeftConfig
from .costs import Costs, default_tile

COEFFICIENT = -1 / 8
"""The largest leak that benchmarks/results/start_loss.md has figures for: remainders of three bits."""

SMALLER = (2, 4)
"""By what tiles are divided: below a quarter of the default, launches take as long as products."""


@dataclass(frozen=True)
class Settings:
    """One step in the order: what it changes, what that is, what it costs."""

    changes: dict[str, Any]
    what: str
    cost: str


def settings_in_order(
    config: Any,
    meft: MeftConfig,
    *,
    tokens: int,
    given: Collection[str],
    allow_coefficient: bool,
) -> list[Settings]:
    """All of them with every layer reversible (or as many as were given).

    Args:
        given: names of settings that are kept whatever they cost, beside all that differ from their defaults.
        allow_coefficient: whether what is computed may change.
    """
    default = MeftConfig()
    free = {name for name in ("attention", "remainders") if name not in given}
    free = {name for name in free if getattr(meft, name) == getattr(default, name)}
    costs = Costs.of(config, tokens)
    made = [Settings({}, "all layers reversible" if meft.reversible_layers is None else "as given", "1.00")]
    if meft.engine != "reversible":
        return made
    changes: dict[str, Any] = {}
    words: list[str] = []
    if allow_coefficient and (lighter := _coefficient(meft, given)):
        changes, words = lighter, ["coefficient -1/8 (changes what is computed)"]
        made.append(Settings(dict(changes), words[0], "1.00"))
    ways: list[tuple[dict[str, Any], str, float, str]] = []
    if "attention" in free and _has_pieces(config):
        ways.append(({"attention": "pieces"}, "attention in pieces", costs.pieces(), ""))
    if "remainders" in free and meft.arithmetic == "exact":
        busy = costs.bus(meft.changed(**changes))
        over = max(0.0, busy - 1)
        ways.append(({"remainders": "host"}, "host remainders", over, f", bus {busy:.0%}"))
    for change, what, cost, beside in ways:
        made.append(Settings({**changes, **change}, " + ".join([*words, what]), f"{1 + cost:.2f}{beside}"))
    if len(ways) > 1:
        both = " + ".join([*words, "pieces", "host remainders"])
        made.append(
            Settings(
                {**changes, **ways[0][0], **ways[1][0]},
                both,
                f"{1 + ways[0][2] + ways[1][2]:.2f}{ways[1][3]}",
            )
        )
    return made


def smaller_tiles(
    after: Settings, config: Any, meft: MeftConfig, *, rows: int, tokens: int, gpu: bool, given: Collection[str]
) -> list[Settings]:
    """The same with smaller tiles, where their size is left open: on top of whatever takes least."""
    default = default_tile(gpu=gpu)
    if "tile" in given or meft.tile != MeftConfig().tile or meft.engine != "reversible":
        return []
    made = []
    for divisor in SMALLER:
        tile = default // divisor
        if tile < rows * tokens:
            idle = f", {Costs.of(config, tokens).idle(tile):.0%} idle" if gpu else ""
            what = f"{after.what} + tile {tile}" if after.changes else f"tile {tile}"
            made.append(Settings({**after.changes, "tile": tile}, what, after.cost + idle))
    return made


def _coefficient(meft: MeftConfig, given: Collection[str]) -> dict[str, Any]:
    """Coefficients that leave fewer bits, where they were left to us."""
    if meft.arithmetic != "exact" or meft.coupling != "centered":
        return {}
    names = [name for name in ("lam", "beta") if getattr(meft, name) is None and name not in given]
    here = dict(zip(("lam", "beta"), meft.coefficients, strict=True))
    return {name: COEFFICIENT for name in names if abs(here[name]) < abs(COEFFICIENT)}


def _has_pieces(config: Any) -> bool:
    found = find_architecture(config.get_text_config().model_type)
    return found is not None and any(kind.attention_pieces is not None for kind in found.layers)
