"""``docs/MODELS.md`` from what the sweep found."""

from __future__ import annotations

import statistics
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

_HEAD = """# Models

Made by `python -m benchmarks.model_sweep` with transformers {version}: every model type of which a tiny model with
random weights can be made, through `patch`, a training step in either engine, and `unpatch`. A type *passes* where
every rebuilt input equals the forward's bit for bit, the worst gradient is within 1e-5 of plain autograd's, and the
unpatched model's outputs are those of before. Where there is no family file, layers and FFN were found and proven on
the model itself.

{passes} pass ({written} of them with a family file), {refused} are refused with a reason, {fails} fail, {unmade} cannot
be made tiny, or not without further packages. Of those that pass: median of the worst gradient {gradient:.1e}; median
change of the outputs by patching alone {start:.2%}; {apart} have layers in two blocks (`variant="meft3"`, MLP in
tiles).

A model of your own, from its config alone: `meft-kernels models --probe <hub id or folder>`.
"""


def page(results: dict[str, Any]) -> str:
    """Markdown."""
    by = {outcome: {k: v for k, v in results.items() if v["outcome"] == outcome} for outcome in _OUTCOMES}
    checks = [check["meft2"] for found in by["passes"].values() if (check := found.get("checks"))]
    head = _HEAD.format(
        version=transformers.__version__,
        passes=len(by["passes"]),
        written=sum(found["written"] for found in by["passes"].values()),
        refused=len(by["refused"]),
        fails=len(by["fails"]),
        unmade=len(by["cannot be made"]),
        gradient=statistics.median([check["worst gradient"] for check in checks] or [0]),
        start=statistics.median([check["start"] for check in checks] or [0]),
        apart=sum("meft3" in found["checks"] for found in by["passes"].values()),
    )
    parts = [head, "\n## Pass\n\n", _table(("model", "`config.model_type`", "layers"), _passing(by["passes"]))]
    for outcome, title in (("refused", "Refused"), ("fails", "Fail"), ("cannot be made", "Not looked at")):
        if by[outcome]:
            rows = [(name_of(k), f"`{k}`", _cell(v.get("reason") or _amiss(v))) for k, v in by[outcome].items()]
            parts += [f"\n## {title}\n\n", _table(("model", "`config.model_type`", "why"), rows)]
    return "".join(parts)


_OUTCOMES = ("passes", "refused", "fails", "cannot be made")


def _passing(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (name_of(model_type), f"`{model_type}`", "family file" if each["written"] else _cell(each.get("found", "")))
        for model_type, each in found.items()
    ]


def _amiss(found: dict[str, Any]) -> str:
    """What of its checks is not as it should be."""
    from .check import passed

    bad = {variant: check for variant, check in found.get("checks", {}).items() if not passed(check)}
    return "; ".join(f"{variant}: {check}" for variant, check in bad.items())


def _cell(text: str) -> str:
    return text.split("; ")[0].replace("|", "\\|").replace("\n", " ")[:240]


def name_of(model_type: str) -> str:
    """As transformers writes it."""
    return str(CONFIG_MAPPING_NAMES.get(model_type, model_type)).removesuffix("Config")


def _table(columns: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> str:
    lines = [columns, ("---", "---", "---"), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
