"""Every error of the library's own, so that callers can tell them apart from Python's."""


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
    """No settings make a training step fit into the memory given; the message says what would."""
