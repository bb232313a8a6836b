"""How things are said: warnings once in a process, and many names in few words."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless this logger has said the same before."""
    logger.warning(message)


def and_others(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are: ``up.weight and 3 others``."""
    return names[0] + (f" and {len(names) - 1} others" if len(names) > 1 else "")
