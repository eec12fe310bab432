"""How often the threads of this process get their turn.

A thread that computes in Python keeps the interpreter for `sys.getswitchinterval`, 5 ms
unless told, and the thread that serves asks for it back after every call into XLA,
several times a step.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

QUICK_S = 1e-4  # what a switch costs is some 10 us


class Turns:
    """Makes turns short while anybody asks for that; the shortest asked for counts.

    The interval is the process's: what it was before comes back with the last one out,
    unless somebody else set it meanwhile.
    """

    def __init__(self) -> None:
        """Change nothing yet."""
        self._lock = threading.Lock()
        self._asked_s: list[float] = []
        self._before_s = self._own_s = 0.0

    @contextlib.contextmanager
    def at_most(self, seconds: float | None) -> Iterator[None]:
        """Let no turn take longer while within; None to leave them alone."""
        if seconds is None:
            yield
            return
        with self._lock:
            if not self._asked_s:
                self._before_s = self._own_s = sys.getswitchinterval()
            self._asked_s.append(seconds)
            self._set()
        try:
            yield
        finally:
            with self._lock:
                self._asked_s.remove(seconds)
                self._set()

    def _set(self) -> None:
        if sys.getswitchinterval() == self._own_s:
            sys.setswitchinterval(min(self._before_s, *self._asked_s, sys.maxsize))
            self._own_s = sys.getswitchinterval()  # in whole microseconds


TURNS = Turns()
