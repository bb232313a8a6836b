"""``docs/MODELS.md`` from what the sweep found."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

_HEAD = """# Models

Every model type that transformers {version} has a class for, {all} of them, made tiny with random weights and put
through `patch`, a training step in either engine, and `unpatch`, in each variant that its layers allow:
`python -m benchmarks.model_sweep`, which wrote this page. A type *passes* where every rebuilt input equals the
forward's bit for bit, the worst gradient is within 1e-5 of plain autograd's, patching alone leaves the outputs where
they were (within 3 %, or shrinking with the coefficient), and the unpatched model's outputs are those of before, bit
for bit. Where there is no family file, layers and FFN were found and proven on the model itself.

| | model types |
| --- | --- |
| [pass](#pass) | {passes}, {written} of them with a family file |
| [refused](#refused): an error that names the reason, before anything has changed | {refused} |
| [fail](#fail): accepted by `patch`, and not as it should be | {fails} |
| [not looked at](#not-looked-at): no tiny model of it was made, or it needs further packages | {unmade} |

Of those that pass: median of the worst gradient {gradient:.1e}; median change of the outputs by patching alone
{start:.2%}; {apart} have layers in two blocks, which `variant="meft3"` and an MLP in tiles need. Of a model of several
towers the language model is patched. What of a class was tested is the class in the table; other heads of the same type
have the same layers.

A model of your own, from its config alone: `meft-kernels models --probe <hub id or folder>`.
"""

USED = (
    "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_next", "qwen2_5_vl", "qwen3_moe", "gemma3", "gemma3n", "gemma4",
    "gpt_oss", "llama4", "mllama", "ministral3", "mistral3", "mistral4", "deepseek_v3", "glm4", "glm4_moe", "glm4v",
    "phi3", "phi4_multimodal", "olmo3", "granite", "granitemoehybrid", "lfm2", "lfm2_vl", "nemotron_h", "falcon_h1",
    "smolvlm", "internvl", "llava_next", "paligemma", "seed_oss", "cohere2", "whisper", "wav2vec2", "dinov3_vit",
    "siglip2", "albert", "nomic_bert",
)  # fmt: skip
"""Those that people fine-tune most."""
_OUTCOMES = ("passes", "refused", "fails", "cannot be made")
_WHY = ("model", "`config.model_type`", "why")
_LAYERS = ("tested", "`config.model_type`", "layers", "FFN", "`meft3`")


def page(results: dict[str, Any]) -> str:
    """Markdown."""
    by = {outcome: {k: v for k, v in results.items() if v["outcome"] == outcome} for outcome in _OUTCOMES}
    checks = [check["meft2"] for found in by["passes"].values() if (check := found.get("checks"))]
    head = _HEAD.format(
        version=" and ".join(sorted({found["transformers"] for found in results.values()})),
        all=len(results),
        passes=len(by["passes"]),
        written=sum(found["written"] for found in by["passes"].values()),
        refused=len(by["refused"]),
        fails=len(by["fails"]),
        unmade=len(by["cannot be made"]),
        gradient=statistics.median([check["worst gradient"] for check in checks] or [0]),
        start=statistics.median([check["start"] for check in checks] or [0]),
        apart=sum("meft3" in found["checks"] for found in by["passes"].values()),
    )
    used = {name: results[name] for name in USED if name in results}
    passing = sum(found["outcome"] == "passes" for found in used.values())
    parts = [head, f"\n## Those that people fine-tune most\n\n{passing} of {len(USED)} pass.\n\n"]
    rows = [(f"`{name}`", found["outcome"], _told(found)) for name, found in used.items()]
    parts += [_table(("`config.model_type`", "", ""), rows)]
    parts += ["\n## Pass\n\n", _table(_LAYERS, [_passing(k, v) for k, v in by["passes"].items()])]
    for outcome, title in (("refused", "Refused"), ("fails", "Fail"), ("cannot be made", "Not looked at")):
        rows = [(name_of(k), f"`{k}`", _told(v)) for k, v in by[outcome].items()]
        parts += [f"\n## {title}\n\n", _table(_WHY, rows) if rows else "None.\n"]
    return "".join(parts)


COUNT = re.compile(r"\d+ of \d+ model types of transformers pass, \d+ of the \d+")


def count(results: dict[str, Any]) -> str:
    """What README and the page on supported models say of all this, as ``COUNT`` finds it."""
    passing = [name for name, found in results.items() if found["outcome"] == "passes"]
    used = len(set(USED).intersection(passing))
    return f"{len(passing)} of {len(results)} model types of transformers pass, {used} of the {len(USED)}"


def _passing(model_type: str, found: dict[str, Any]) -> tuple[str, ...]:
    layers = _lists(found)
    places = "<br>".join(f"`{name}` ({kinds})" for name, kinds, _ in layers) or "family file"
    taps = "<br>".join(dict.fromkeys(tap for _, _, tap in layers))
    tested = found["class"] + (f" ({found['note']})" if "note" in found else "")
    return tested, f"`{model_type}`", places, taps, "yes" if "meft3" in found["checks"] else "no"


def _lists(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Names of the lists of layers that were found, the layers' classes, where their FFN is."""
    lists = re.findall(r"(?:^|; )(\S+), \d+ ([^,;]+), H = \d+, FFN ([^,;]+)", found.get("found", ""))
    return [(name, kinds, tap) for name, kinds, tap in lists]


def _told(found: dict[str, Any]) -> str:
    """Why it does not pass; of one that does, its layers."""
    if found["outcome"] == "passes":
        return "family file" if found["written"] else ", ".join(f"`{name}`" for name, _, _ in _lists(found))
    return _cell(found.get("reason") or _amiss(found))


def _amiss(found: dict[str, Any]) -> str:
    """What of its checks is not as it should be."""
    from .check import passed

    bad = {variant: check for variant, check in found.get("checks", {}).items() if not passed(check)}
    return "; ".join(f"{variant}: {check}" for variant, check in bad.items())


def _cell(text: str) -> str:
    """The first reasons, of lists that were called at all if there are such."""
    text = text.removesuffix(".")
    text = re.sub(r" \(and \d+ more\)$", "", text)
    reasons = text.split("; ")
    called = [reason for reason in reasons if "its layers were not called" not in reason]
    return (called or reasons)[0].replace("|", "\\|").replace("\n", " ")[:240]


def name_of(model_type: str) -> str:
    """As transformers writes it."""
    return str(CONFIG_MAPPING_NAMES.get(model_type, model_type)).removesuffix("Config")


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
