"""Ctrl-C and SIGTERM: training goes on to the end of its step, saves a checkpoint, and stops."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nstopping after this step, with a checkpoint; once more stops at once, without\n"
_SHOW_CURSOR = b"\x1b[?25h"


class SaveAndStop(TrainerCallback):
    """Stops a Trainer at a step's end where a resumed run does just what an uninterrupted one would have done.

    Checkpoints of an epoch's last step, and of the run's, are made after the epoch's evaluation, not before it: that
    draws a random number (the data loader's seed), and a run resumed from before it would neither draw it nor evaluate.
    """

    def __init__(self) -> None:
        self.requested = False
        self._due = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests to stop, inside a ``with`` block in the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.requested = True
        for each in _SIGNALS:  # the next one ends the process, whatever it is doing
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() == self._process:  # not the workers of a data loader, which inherit the handler
            # print() may be what was interrupted, and does not bear being called again.
            os.write(2, (_SHOW_CURSOR if sys.stderr.isatty() else b"") + _NOTE)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._due = False
        if self.requested:
            control.should_save = control.should_training_stop = True
        if control.should_save and _is_over(state):
            control.should_save, self._due = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if _is_over(state):
            control.should_save = control.should_save or self._due or self.requested
            control.should_training_stop = control.should_training_stop or self.requested
        elif self.requested:  # called in the middle, because training stops: all is saved, and the epoch is not over
            control.should_save = control.should_evaluate = control.should_log = False
        self._due = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluation comes before saving: a request that came meanwhile is met at once."""
        if self.requested:
            control.should_save = control.should_training_stop = True


def _is_over(state: Any) -> bool:
    """Whether the epoch or the run ends with this step."""
    return bool(state.global_step >= state.max_steps or float(state.epoch or 0.5).is_integer())
