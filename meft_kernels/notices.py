"""Warnings that are worth saying once in a process."""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless this logger has said the same before."""
    logger.warning(message)
