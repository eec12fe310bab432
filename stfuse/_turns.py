"""How often threads get their turn while one of them traces.

A thread that computes in Python keeps the interpreter for `sys.getswitchinterval`, 5 ms
unless told, and who serves asks for it several times a step.
"""

from __future__ import annotations

import sys
import threading

_QUICK_S = 1e-4  # what a switch costs is some 10 us


class Turns:
    """Makes turns short while any thread is within; it may be entered many times.

    The interval is the process's: what it was before comes back with the last one out,
    unless somebody else set it meanwhile.
    """

    def __init__(self) -> None:
        """Change nothing yet."""
        self._lock = threading.Lock()
        self._num_within = 0
        self._before_s = self._quick_s = 0.0

    def __enter__(self) -> None:
        """Shorten turns."""
        with self._lock:
            self._num_within += 1
            if self._num_within == 1:
                self._before_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before_s, _QUICK_S))
                self._quick_s = sys.getswitchinterval()  # in whole microseconds

    def __exit__(self, *error: object) -> None:
        """Leave them as they were."""
        with self._lock:
            self._num_within -= 1
            is_ours = sys.getswitchinterval() == self._quick_s
            if not self._num_within and is_ours:
                sys.setswitchinterval(self._before_s)


SHORT_TURNS = Turns()
