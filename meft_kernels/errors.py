"""Every error of the library's own, so that callers can tell them apart from Python's."""

from typing import Any


class MeftError(Exception):
    """Base class."""


class UnsupportedModelError(MeftError, ValueError):
    """The model cannot be made reversible; the message says why and lists what can."""


class PatchError(MeftError, RuntimeError):
    """``patch`` or ``unpatch`` was asked for something that contradicts the model's present state."""


class AdapterFileError(MeftError, ValueError):
    """A saved adapter does not fit the model, or is damaged."""


class ReversibleUsageError(MeftError, RuntimeError):
    """The reversible stack is used in a way that would give wrong results (a second backward, say)."""


class StreamOverflowError(MeftError, OverflowError):
    """A stream left the range of its fixed-point format."""


class NonFiniteError(MeftError, FloatingPointError):
    """A NaN or an infinity entered the streams."""


class NotRepeatableError(MeftError, RuntimeError):
    """A layer did not compute the same bits in backward as in forward, so the rebuilt inputs are wrong."""


class BudgetError(MeftError, ValueError):
    """No settings make a training step fit into the memory given; the message says what would.

    Attributes:
        longest: tokens of the longest texts that fit, 0 where none do.
        candidates: all that was tried (:class:`meft_kernels.planning.Candidate`).
    """

    def __init__(self, message: str, longest: int = 0, candidates: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.longest = longest
        self.candidates = candidates
