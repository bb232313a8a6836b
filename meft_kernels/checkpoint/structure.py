"""Which layers an adapter is in, as its folder tells it, and what a model without a family file was found to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..architectures.found import FoundLayers
from ..architectures.found.saved import from_plain, to_plain
from ..errors import AdapterFileError
from ..patching.state import PatchState

Structure = list[dict[str, Any]]


def structure_of(state: PatchState) -> Structure:
    """For every list of layers its name and where streams begin anew in it; of one that was found, all of that."""
    found: dict[str, dict[str, Any]] = {}
    for stack in state.stacks:
        if stack.name in found:
            found[stack.name]["begins"].append(stack.first)
            continue
        found[stack.name] = {"list": stack.name, "begins": []}
        if isinstance(stack.spec, FoundLayers):
            found[stack.name]["found"] = to_plain(stack.spec)
    return list(found.values())


def is_structure(value: Any) -> bool:
    """Whether it is what :func:`structure_of` gives; earlier versions wrote none."""
    if value is None:
        return True
    try:
        return (
            isinstance(value, list)
            and all(isinstance(each["list"], str) for each in value)
            and all(isinstance(place, int) for each in value for place in each["begins"])
            and all(from_plain(each["found"]).list_name == each["list"] for each in value if "found" in each)
        )
    except (TypeError, KeyError, ValueError):
        return False


def found_layers(structure: Structure | None) -> tuple[FoundLayers, ...]:
    """What was found of each list."""
    return tuple(from_plain(each["found"]) for each in structure or [] if "found" in each)


def check_structure(path: Path, structure: Structure | None, state: PatchState) -> None:
    """Hold a patched model to what an adapter's folder says.

    Raises:
        AdapterFileError: its adapters are in other lists of layers, or its streams begin elsewhere; names the list.
    """
    if structure is None:
        return
    here = {each["list"]: each["begins"] for each in structure_of(state)}
    there = {each["list"]: each["begins"] for each in structure}
    for name in {**there, **here}:
        if name not in here:
            raise AdapterFileError(
                f"{path} is of adapters in {', '.join(there)}, and this model is patched in {', '.join(here)}: {name} "
                "is not among them"
            )
        if name not in there:
            raise AdapterFileError(f"{path} has no adapters of {name}, which is patched in this model")
        if here[name] != there[name]:
            raise AdapterFileError(
                f"{path}: streams of {name} began anew at layers {_listed(there[name])} when the adapter was saved, "
                f"and do so at {_listed(here[name])} here, so that the adapter would compute something else"
            )


def _listed(places: list[int]) -> str:
    return ", ".join(map(str, places)) or "none"
