"""Which of a model's lists of layers the user means by a name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase


def choose(names: Sequence[str], wanted: tuple[str, ...] | None) -> list[str]:
    """Those of the lists of layers that are wanted.

    Args:
        names: of lists.
        wanted: names of lists, or of modules around them, or patterns of names; None for all.

    Raises:
        ValueError: there is no list of a name that is wanted; names those there are.
    """
    if wanted is None:
        return list(names)
    if unknown := unmet(names, wanted):
        raise ValueError(f"stacks: no list of layers is named {', '.join(unknown)}; there are {', '.join(names)}")
    return [name for name in names if any(is_meant(name, each) for each in wanted)]


def unmet(names: Collection[str], wanted: tuple[str, ...]) -> list[str]:
    """What is wanted and means none of these lists."""
    return [each for each in wanted if not any(is_meant(name, each) for name in names)]


def is_meant(name: str, wanted: str) -> bool:
    """Whether the list of this name is meant by a name, its own or that of a module around it, or by a pattern."""
    return name == wanted or name.startswith(f"{wanted}.") or fnmatchcase(name, wanted)
