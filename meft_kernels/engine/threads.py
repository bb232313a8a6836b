"""What threads that share a model must not do to each other: each has its own switch, and changes wait for passes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ReversibleUsageError


class Switch(threading.local):
    """Whether this thread leaves the adapters out; copies and pickles of it are new ones."""

    bypassed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Switch, ()


class Turn:
    """A lock; copies and pickles of it are new ones."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Gate:
    """Lets passes of several threads through at a time, or one change of what all of them read.

    A thread may pass inside of its own pass, and inside of its own change. Copies and pickles are new ones.
    """

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._passing: dict[int, int] = {}
        """Thread to the number of its passes under way, one inside the other."""
        self._changing: int | None = None
        self._waiting = 0
        """Changes that wait; new passes let them go first."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Gate, ()

    def enter(self) -> None:
        """A pass of this thread begins; waits for changes of other threads."""
        me = threading.get_ident()
        with self._moved:
            if me not in self._passing and me != self._changing:
                self._moved.wait_for(lambda: self._changing is None and not self._waiting)
            self._passing[me] = self._passing.get(me, 0) + 1

    def leave(self) -> None:
        """A pass of this thread has ended."""
        me = threading.get_ident()
        with self._moved:
            self._passing[me] -= 1
            if not self._passing[me]:
                del self._passing[me]
                if self._waiting:
                    self._moved.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Run a block while no other thread passes or changes.

        Raises:
            ReversibleUsageError: inside of a pass of this thread.
        """
        me = threading.get_ident()
        with self._moved:
            if me in self._passing and me != self._changing:
                raise ReversibleUsageError(
                    "adapters cannot be switched in the middle of a forward pass, some of whose layers have run: do it "
                    "before or after"
                )
            outer = self._changing
            self._waiting += 1
            try:
                self._moved.wait_for(lambda: self._changing in (None, me) and not self._passing.keys() - {me})
            finally:
                self._waiting -= 1
            self._changing = me
        try:
            yield
        finally:
            with self._moved:
                self._changing = outer
                self._moved.notify_all()
