"""How often the threads of this process get their turn.

A thread that computes in Python keeps the interpreter for `sys.getswitchinterval`, 5 ms
unless told, and the thread that serves asks for it back after every call into XLA. One
that soon waits for something gives it back by itself: then a long turn costs nobody
anything, and saves switches. So turns are long until somebody uses them up.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

QUICK_S = 5e-4  # what a switch costs is some 10 us
LONG_S = 2e-3
_LOOK = 16  # launches; somebody uses turns up if half of them waited for so much of one
_USED_UP = 0.75
_SHORT_FOR_S = (1.0, 64.0)  # then turns are short for so long: at first, and at most
# Who is refused rests so long: a thread that asked again at once would take the
# interpreter from those who serve the others. So many times at once: to fall asleep,
# and to get the interpreter back, costs more than to be refused.
_REFUSED_S, _REFUSALS = 1e-4, 8
_RUN_S = 2e-4  # of a thread that gives way, between two rests
_REST, _LONG_REST = 12.0, 50.0  # times as long as it ran
_EVENTS = 128  # calls and returns of functions, between two looks at the clock
_STARTS = 16  # the same of Python's own functions, of which there are fewer
_AGAIN_S = 0.03  # until starts that were switched off are heard of again
_TOOLS = (3, 4)  # of `sys.monitoring`: those that are nobody's by name
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

    def at_most(self, seconds: float | None) -> contextlib.AbstractContextManager[None]:
        """Let no turn take longer while within; None to leave them alone."""
        return OwnTurns(seconds, turns=self).held()

    def ask(self, seconds: float | None, before: float | None = None) -> None:
        """Ask for turns of some seconds in place of those asked for before, or None."""
        with self._lock:
            if not self._asked_s:
                self._before_s = self._own_s = sys.getswitchinterval()
            if before is not None:
                self._asked_s.remove(before)
            if seconds is not None:
                self._asked_s.append(seconds)
            self._set()

    def _set(self) -> None:
        if sys.getswitchinterval() == self._own_s:
            sys.setswitchinterval(min([self._before_s, *self._asked_s]))
            self._own_s = sys.getswitchinterval()  # in whole microseconds


TURNS = Turns()


class OwnTurns:
    """What an engine asks for: always the same, or long turns as long as that is good.

    A thread that launches gives the interpreter away and wants it back at once. If it
    often waits for most of a turn, somebody computes without end: turns are short for
    a while then.

    Args:
        seconds: of a turn; None to leave them alone.
        is_choosing: whether ``seconds`` is for as long as nobody uses it up.
        turns: the process's.
    """

    def __init__(
        self,
        seconds: float | None = None,
        *,
        is_choosing: bool = False,
        turns: Turns = TURNS,
    ) -> None:
        """Ask for nothing yet."""
        self.seconds = seconds
        self._is_choosing = is_choosing
        self._turns = turns
        self._num = self._num_used_up = 0
        self._short_until_s, self._short_for_s = math.inf, _SHORT_FOR_S[0]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Ask for them while within."""
        if self.seconds is None:
            yield
            return
        self._turns.ask(self.seconds)
        try:
            yield
        finally:
            self._turns.ask(None, self.seconds)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look at how long a launch within waited for the interpreter."""
        if not self._is_choosing:
            yield
            return
        start_s, ran_s = time.perf_counter(), time.thread_time()
        yield
        ran_s, now_s = time.thread_time() - ran_s, time.perf_counter()
        self.waited(now_s - start_s - ran_s, now_s)

    def waited(self, seconds: float, now_s: float) -> None:
        """Take note of how long a launch waited for the interpreter, and choose.

        Args:
            seconds: that it waited.
            now_s: the time, seconds of any clock.
        """
        if self.seconds == QUICK_S:
            if now_s >= self._short_until_s:
                self._choose(LONG_S)
            return
        self._num += 1
        self._num_used_up += seconds >= _USED_UP * sys.getswitchinterval()
        if self._num < _LOOK:
            return
        if 2 * self._num_used_up >= _LOOK:
            self._choose(QUICK_S)
            self._short_until_s = now_s + self._short_for_s
            self._short_for_s = min(2 * self._short_for_s, _SHORT_FOR_S[1])
        elif not self._num_used_up:
            self._short_for_s = _SHORT_FOR_S[0]
        self._num = self._num_used_up = 0

    def _choose(self, seconds: float) -> None:
        before, self.seconds = self.seconds, seconds
        self._turns.ask(seconds, before)


class Refusals(threading.local):
    """How long a thread that is refused has to rest; each knows its own refusals."""

    def __init__(self) -> None:
        """Owe no rest."""
        self._until_s = -math.inf

    def rest_s(self, now_s: float) -> float:
        """Return how long to rest for this refusal and those before; 0 for later.

        Args:
            now_s: the time, seconds of any clock.
        """
        self._until_s = max(self._until_s, now_s) + _REFUSED_S
        left_s = self._until_s - now_s
        return left_s if left_s > (_REFUSALS - 0.5) * _REFUSED_S else 0.0


REFUSALS = Refusals()


class _Starts:
    """Calls back whenever a Python function starts in one of some threads.

    From Python 3.12 on a profile function of one thread makes all threads half as fast.
    A start in another thread is heard of here, too, but once: that function's are then
    switched off for a while, for all threads, and cost nothing.

    Attributes:
        looks: what is called, by thread.
        tool: the number under which Python knows of this; None while nobody listens.
    """

    def __init__(self) -> None:
        """Listen to nobody yet."""
        self._lock = threading.Lock()
        self.looks: dict[int, Callable[..., None]] = {}
        self.tool: int | None = None
        self._again_s = 0.0

    @contextlib.contextmanager
    def watched(self, look: Callable[..., None]) -> Iterator[None]:
        """Call back in this thread while within, if Python has a tool left for it."""
        thread = threading.get_ident()
        before = self.looks.get(thread)
        try:
            with self._lock:
                self.looks[thread] = look
                self._listen()
            yield
        finally:
            with self._lock:
                del self.looks[thread]
                if before is not None:
                    self.looks[thread] = before
                self._listen()

    def _listen(self) -> None:
        """Listen while there is anybody to call, also to what was switched off."""
        tools: Any = sys.monitoring  # type: ignore[attr-defined]
        start = tools.events.PY_START
        if self.looks and self.tool is None:
            free = [tool for tool in _TOOLS if tools.get_tool(tool) is None]
            for self.tool in free[:1]:
                tools.use_tool_id(self.tool, "stfuse")
                tools.register_callback(self.tool, start, self._started)
                tools.set_events(self.tool, start)
        if self.tool is None:
            return
        tools.restart_events()  # also for whoever has this number next
        if not self.looks:
            tools.set_events(self.tool, 0)
            tools.register_callback(self.tool, start, None)
            tools.free_tool_id(self.tool)
            self.tool = None

    def _started(self, *start: Any) -> Any:
        look = self.looks.get(threading.get_ident())
        if look is None:
            return sys.monitoring.DISABLE  # type: ignore[attr-defined]
        look(*start)
        if (now_s := time.monotonic()) >= self._again_s:
            self._again_s = now_s + _AGAIN_S
            sys.monitoring.restart_events()  # type: ignore[attr-defined]
        return None


@contextlib.contextmanager
def _profiled(look: Callable[..., None]) -> Iterator[None]:
    """Call back at each call and return of this thread's functions while within."""
    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


_HAS_EVENTS = hasattr(sys, "monitoring")  # from Python 3.12 on
_STARTED = _Starts()


@contextlib.contextmanager
def giving_way(
    is_served: bool, num_waiting: Callable[[], int], many: int
) -> Iterator[None]:
    """Let this thread rest most of its time while others wait, or nearly all.

    Python has no priorities: a thread that traces gets as many turns as the one that
    serves, which is too few for that one where it needs more than half of them. So it
    looks at the clock every so many calls of functions, which makes it about twice as
    slow by itself, and nobody else.

    Args:
        is_served: whether anybody is; if not, this does nothing.
        num_waiting: how many do now.
        many: more than these: then this thread may be why.
    """
    if not is_served:
        yield
        return
    between = _STARTS if _HAS_EVENTS else _EVENTS
    began_s, left = time.thread_time(), between

    def look(*_: Any) -> None:
        nonlocal began_s, left
        left -= 1
        if not left:
            left, ran_s = between, time.thread_time() - began_s
            if ran_s > _RUN_S:
                if num := num_waiting():
                    times = _LONG_REST if num > many else _REST
                    time.sleep(min(times * ran_s, _MOST_REST_S))
                began_s = time.thread_time()

    with (_STARTED.watched if _HAS_EVENTS else _profiled)(look):
        yield
