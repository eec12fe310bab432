"""How often the threads of this process get their turn.

A thread that computes in Python keeps the interpreter for `sys.getswitchinterval`, 5 ms
unless told, and the thread that serves asks for it back after every call into XLA,
several times a step.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

QUICK_S = 5e-4  # what a switch costs is some 10 us
# Who is refused rests so long before it hears of it: a thread that asked again at once
# would take the interpreter from those who serve the others.
REFUSED_S = 1e-4
_RUN_S = 2e-4  # of a thread that gives way, between two rests
_REST = 5.0  # times as long as it ran
_CALLS = 128  # between two looks at the clock
_MOST_REST_S = 0.05  # whatever it did: a compiler runs for long and holds up nobody


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
            sys.setswitchinterval(min([self._before_s, *self._asked_s]))
            self._own_s = sys.getswitchinterval()  # in whole microseconds


TURNS = Turns()


@contextlib.contextmanager
def giving_way(is_served: bool, is_behind: Callable[[], bool]) -> Iterator[None]:
    """Let this thread rest five sixths of its time while others wait.

    Python has no priorities: a thread that traces gets as many turns as the one that
    serves, which is too few for that one where it needs more than half of them. So it
    looks at the clock every so many calls of functions, which makes it about twice as
    slow by itself.

    Args:
        is_served: whether anybody is; if not, this does nothing.
        is_behind: whether anybody waits now.
    """
    if not is_served:
        yield
        return
    began_s, left = time.thread_time(), _CALLS

    def look(*_: Any) -> None:
        nonlocal began_s, left
        left -= 1
        if not left:
            left, ran_s = _CALLS, time.thread_time() - began_s
            if ran_s > _RUN_S:
                if is_behind():
                    time.sleep(min(_REST * ran_s, _MOST_REST_S))
                began_s = time.thread_time()

    before = sys.getprofile()
    sys.setprofile(look)  # of this thread only
    try:
        yield
    finally:
        sys.setprofile(before)
