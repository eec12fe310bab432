"""Futures of requests, and the thread that runs their callbacks.

A future without callbacks is resolved where its answer is; one with callbacks on the
thread of callbacks, so that a slow one does not hold up the device; and one that an
event loop awaits on another, so that a slow callback does not hold up that either.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    PENDING,
    RUNNING,
)
from typing import Any

from absl import logging

from stfuse._errors import StfuseError

_LOCK = threading.Lock()
_OPEN = (PENDING, RUNNING)
_CANCELLED = (CANCELLED, CANCELLED_AND_NOTIFIED)


class Answer(Future[Any]):
    """The future of a request; cancelling it gives its place free at once.

    A condition is most of what a future costs, and only who blocks on one needs it: it
    is made when somebody asks for it. Until then `_LOCK` guards the state of all
    answers, after that the condition does, as in any future.

    Args:
        number: the request's.
        on_cancel: called with the number, by whoever cancelled.
    """

    has_callbacks = False
    is_awaited = False  # its callbacks are `infer_async`'s, and quick

    def __init__(self, number: int, on_cancel: Callable[[int], None]) -> None:
        """Start as `Future` does, but without a condition."""
        self._made: threading.Condition | None = None
        self._state = PENDING
        self._result = self._exception = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Any] = []
        self._number = number
        self._on_cancel = on_cancel

    @property
    def _condition(self) -> threading.Condition:
        if self._made is None:
            with _LOCK:
                self._made = self._made or threading.Condition()
        return self._made

    def done(self) -> bool:
        """Return whether it was cancelled or has its outcome."""
        return self._state not in _OPEN

    def cancelled(self) -> bool:
        """Return whether it was cancelled."""
        return self._state in _CANCELLED

    def result(self, timeout: float | None = None) -> Any:
        """Return its result, or raise its exception, once there is one."""
        if self._state == FINISHED and self._exception is None:
            return self._result
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return its exception once it is done, None if it has a result."""
        if self._state == FINISHED:
            return self._exception
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Have ``fn`` called with this future once it is done."""
        self.has_callbacks = True
        with _LOCK:
            if self._made is None and self._state in _OPEN:
                self._done_callbacks.append(fn)
                return
        super().add_done_callback(fn)

    def set_running_or_notify_cancel(self) -> bool:
        """Take note that it runs; return False if it was cancelled."""
        with _LOCK:
            if self._made is None and self._state == PENDING:
                self._state = RUNNING
                return True
        return super().set_running_or_notify_cancel()

    def set_result(self, result: Any) -> None:
        """Give it its result."""
        with _LOCK:
            is_alone = self._made is None and self._state in _OPEN
            if is_alone:
                self._result, self._state = result, FINISHED
        if not is_alone:
            super().set_result(result)
        elif self._done_callbacks:
            self._invoke_callbacks()  # pyright: ignore[reportAttributeAccessIssue]

    def cancel(self) -> bool:
        """Cancel, unless it runs or is done; return whether it is cancelled."""
        is_cancelled = super().cancel()
        if is_cancelled:
            self._on_cancel(self._number)
        return is_cancelled


Outcome = tuple[Answer, Any]  # a future, and its result or exception
_Queue = queue.SimpleQueue[Sequence[Outcome] | None]


class Callbacks:
    """Resolves futures; `run` and `run_awaited` are threads of those with callbacks."""

    def __init__(self) -> None:
        """Start with nothing to do."""
        self._waiting: _Queue = queue.SimpleQueue()
        self._awaited: _Queue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def resolve(self, outcomes: Sequence[Outcome]) -> None:
        """Give futures their outcomes; never raises, never waits for a callback."""
        deferred, awaited = [], []
        for outcome in outcomes:
            if not outcome[0].has_callbacks:
                settle(*outcome)
            else:
                (awaited if outcome[0].is_awaited else deferred).append(outcome)
        if deferred:
            self._waiting.put(deferred)
        if awaited:
            self._awaited.put(awaited)

    def run(self) -> None:
        """Resolve what has callbacks until closed: the callback thread."""
        self._thread = threading.current_thread()
        _settle_all(self._waiting)

    def run_awaited(self) -> None:
        """Resolve what event loops await until closed: a thread of its own."""
        _settle_all(self._awaited)

    def close(self) -> None:
        """Let both threads return once they resolved what they have."""
        self._awaited.put(None)
        self._waiting.put(None)

    def is_own_thread(self) -> bool:
        """Return whether the caller is a callback."""
        return threading.current_thread() is self._thread


def _settle_all(waiting: _Queue) -> None:
    while (outcomes := waiting.get()) is not None:
        for outcome in outcomes:
            settle(*outcome)


def settle(future: Future[Any], outcome: Any) -> None:
    """Give a future its outcome, unless its owner was faster and cancelled it."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass
    except BaseException as error:  # SystemExit of a callback must not end a thread
        logging.error("stfuse: a future's callback raised %r", error)


def resolve_all(futures: list[Future[None]], error: StfuseError | None = None) -> None:
    """Resolve futures that still wait, and forget those of a list of swaps."""
    for future in futures:
        if future.done() or not future.set_running_or_notify_cancel():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
    futures.clear()
