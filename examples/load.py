"""Two ways to send a request stream: as it comes, and as fast as possible.

As they come is open loop: a request has an intended send time, drawn before anything
is sent, and latency and deadline count from it. A server that stalls the sender gains
nothing by it (no coordinated omission).

Axes: R requests. Times are seconds from the start of a stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

import stfuse
from examples.streams import Stream

ANSWER_TIMEOUT_S = 60.0
REFILL_S = 0.002  # between looks at a full window
WINDOW = 1024  # outstanding in a closed loop: more than is served between two looks
WARM_UP_SHARE = 0.2  # of a closed loop, sent but not counted
LEAD_S = 0.01  # from the start of a replay to the start of its stream
PERCENTILES = (50.0, 99.0, 99.9)
REFUSALS = (stfuse.QueueFullError, stfuse.DeadlineError)

Clock = Callable[[], float]
_SERVED: Future[Any] = Future()  # stands for all whose output is not kept
_SERVED.set_result(None)


class Target(NamedTuple):
    """Whom a stream may ask, and what.

    Attributes:
        name: of a job.
        inputs: its different requests; a stream says which by index.
    """

    name: str
    inputs: Sequence[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What became of a stream.

    Attributes:
        stream: the requests that were to be sent.
        sent_s: when each was sent, float64 [R]; NaN for those whose deadline had
            passed before the sender came to them.
        latency_s: from the *intended* send time to the answer, float64 [R]; infinite
            for requests that were not sent, were refused, or expired.
        outputs: answers, R of them; None if not answered, or not kept.
        answered_per_s: answers per second, after the warm-up in a closed loop.
        start_s: when the stream started, on the sender's clock.
    """

    stream: Stream
    sent_s: np.ndarray
    latency_s: np.ndarray
    outputs: list[Any]
    answered_per_s: float
    start_s: float

    @property
    def is_answered(self) -> np.ndarray:
        """Which requests got an answer, bool [R]."""
        return np.isfinite(self.latency_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What became of the requests that were due in some window.

    Attributes:
        offered: how many there were.
        offered_per_s: the same per second of the window.
        answered_per_s: answers *given* in the window, per second.
        goodput_per_s: requests due in it that were answered within their deadline.
        shed: share of the offered that was refused or expired.
        late: share that was answered after its deadline.
        unsent: share whose deadline passed before the sender came to it.
        p50_ms: median latency of the answered, from the intended send time.
        p99_ms: its 99th percentile; NaN if nothing was answered.
        p999_ms: its 99.9th.
        lag_ms: 99th percentile of how late requests were sent.
    """

    offered: int
    offered_per_s: float
    answered_per_s: float
    goodput_per_s: float
    shed: float
    late: float
    unsent: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    lag_ms: float


def percentiles(values: np.ndarray, q: Sequence[float] = PERCENTILES) -> np.ndarray:
    """Return percentiles by nearest rank, NaN of nothing: a value that was seen."""
    if not len(values):
        return np.full(len(q), np.nan)
    # Rounded: 99.9% of 1000 is the 999th, and not the next because of a last bit.
    ranks = [math.ceil(round(percent * len(values) / 100, 6)) for percent in q]
    return np.sort(values)[np.array(ranks) - 1]


def summarize(
    run: Run,
    deadline_s: float | None,
    start_s: float,
    end_s: float,
    which: np.ndarray | None = None,
) -> Summary:
    """Count what became of the requests that were due from ``start_s`` to ``end_s``.

    Args:
        run: an open loop's.
        deadline_s: that the requests had, from their intended send time.
        start_s: of the window; what is due before is warm-up.
        end_s: of the window.
        which: bool [R], the requests to count; all if None.
    """
    due_s, latency_s = run.stream.due_s, run.latency_s
    counted = np.ones(len(due_s), bool) if which is None else which
    done_s, seconds = due_s + latency_s, end_s - start_s
    given = np.sum(counted & (done_s >= start_s) & (done_s < end_s))
    counted = counted & (due_s >= start_s) & (due_s < end_s)
    own_s, sent_s = latency_s[counted], run.sent_s[counted]
    is_answered, is_sent = np.isfinite(own_s), np.isfinite(sent_s)
    limit_s = np.inf if deadline_s is None else deadline_s
    num_good = np.sum(is_answered & (own_s <= limit_s))
    offered = max(len(own_s), 1)
    lag_s = (sent_s - due_s[counted])[is_sent]
    return Summary(
        len(own_s),
        len(own_s) / seconds,
        float(given / seconds),
        float(num_good / seconds),
        float(np.sum(is_sent & ~is_answered) / offered),
        float((np.sum(is_answered) - num_good) / offered),
        float(np.sum(~is_sent) / offered),
        *(1e3 * percentiles(own_s[is_answered])).tolist(),
        float(1e3 * percentiles(lag_s, (99.0,))[0]),
    )


def named(values: Mapping[str, float]) -> str:
    """Return numbers with their names, as text."""
    return ", ".join(f"{name} {value:.0f}" for name, value in values.items())


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Keep the collector away: over thousands of kept futures it is a long pause."""
    is_first = gc.isenabled()
    if is_first:
        gc.collect()
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.enable()


class _Sender:
    """Sends requests of a stream to an engine, and keeps what comes back."""

    def __init__(
        self,
        engine: stfuse.Engine,
        targets: Sequence[Target],
        stream: Stream,
        clock: Clock,
        keep_every: int,
        in_flight: int | None = None,
    ) -> None:
        self._keep_every = keep_every
        self._room = None if in_flight is None else threading.Semaphore(in_flight)
        self._submit, self._clock = engine.submit, clock
        self._targets = targets
        self._requests = list(
            zip(stream.tenants.tolist(), stream.rows.tolist(), strict=True)
        )
        self.futures: list[Future[Any] | None] = []
        self.sent_s: list[float] = []
        self.done_s = [float("inf")] * len(self._requests)
        self.done: list[int] = []

    def has_room(self, until_s: float) -> bool:
        """Wait until the client may have one more outstanding; False if too long."""
        if self._room is None:
            return True
        return self._room.acquire(timeout=max(until_s - self._clock(), 0.0))

    def send(self, now_s: float, deadline_s: float | None) -> None:
        """Submit the next request; note when it is answered, or that it was refused."""
        i = len(self.futures)
        tenant, row = self._requests[i]
        name, inputs = self._targets[tenant]
        self.sent_s.append(now_s)
        try:
            future = self._submit(name, inputs[row], deadline_s=deadline_s)
        except REFUSALS:
            self.futures.append(None)
            self.leave()
        else:
            self.futures.append(future)
            future.add_done_callback(functools.partial(self._stamp, i))

    def skip(self, num: int) -> None:
        """Leave out the next requests."""
        self.sent_s += [float("nan")] * num
        self.futures += [None] * num

    def leave(self) -> None:
        if self._room is not None:
            self._room.release()

    def _stamp(self, i: int, future: Future[Any]) -> None:
        self.done_s[i] = self._clock()
        self.leave()
        self.done.append(i)
        if i % self._keep_every and future.exception() is None:
            self.futures[i] = _SERVED

    def answers(self) -> tuple[list[Any], np.ndarray]:
        """Wait for everything sent; return answers, R, and times of answer [R]."""
        outputs: list[Any] = []
        done_s = np.full(len(self.futures), np.inf)
        for i, future in enumerate(self.futures):
            error = None if future is None else future.exception(ANSWER_TIMEOUT_S)
            if future is None or error is not None:
                outputs.append(None)
            else:
                outputs.append(future.result())
                while math.isinf(self.done_s[i]):
                    time.sleep(1e-4)  # a future wakes us before its callbacks run
                done_s[i] = self.done_s[i]
            if error and not isinstance(error, REFUSALS):
                raise error
        return outputs, done_s


def replay(
    engine: stfuse.Engine,
    targets: Sequence[Target],
    stream: Stream,
    deadline_s: float | None,
    *,
    start_s: float | None = None,
    keep_every: int = 1,
    in_flight: int | None = None,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Run:
    """Send a stream open loop: each request when it is due, whatever became of others.

    All that is due is sent at once. A sender that lags sends late, and not at all what
    can no longer be in time; latency and deadline count from the intended time.

    Args:
        engine: has a job for every target.
        targets: in the order that the stream's indices mean.
        stream: what to send.
        deadline_s: for every request, from its intended send time; None for none.
        start_s: when the stream starts, on the clock; None for at once.
        keep_every: of so many outputs one is kept; the others are dropped as they
            come, as by a client that is done with them: new memory for each would cost
            more than the engine does.
        in_flight: requests that the client has outstanding at most; it waits for an
            answer before it sends more, and sends none after the stream's last time.
            None: however many are due.
        clock: returns seconds.
        sleep: waits for some seconds.

    Returns:
        The run, all requests of the stream in it.
    """
    sender = _Sender(engine, targets, stream, clock, keep_every, in_flight)
    with no_collections():
        if start_s is None:
            start_s = clock() + LEAD_S
        end_s = start_s + np.max(stream.due_s, initial=0.0)
        for due_s in (start_s + stream.due_s).tolist():
            if not sender.has_room(end_s):
                break
            now_s = clock()
            if now_s < due_s:
                sleep(due_s - now_s)
                now_s = clock()
            left_s = None if deadline_s is None else due_s + deadline_s - now_s
            if left_s is None or left_s > 0:
                sender.send(now_s, left_s)
            else:
                sender.skip(1)
                sender.leave()
        # At once: a loop would keep the interpreter from those who are still served.
        sender.skip(len(stream.due_s) - len(sender.futures))
        outputs, done_s = sender.answers()
    sent_s = np.array(sender.sent_s) - start_s
    latency_s = done_s - start_s - stream.due_s
    num_answered = np.isfinite(latency_s).sum()
    end_s = np.max(done_s, initial=start_s, where=np.isfinite(done_s))
    rate = num_answered / max(end_s - start_s, 1e-9)
    return Run(stream, sent_s, latency_s, outputs, rate, start_s)


def replay_all(
    engine: stfuse.Engine,
    targets: Sequence[Target],
    streams: Sequence[Stream],
    deadline_s: float | None,
    keep_every: int = 1,
    in_flight: Sequence[int | None] = (),
) -> list[Run]:
    """Send several streams at once, as clients that do not wait for each other.

    Args:
        engine: has a job for every target.
        targets: in the order that the streams' indices mean.
        streams: one for each client; each is sent from a thread of its own.
        deadline_s: as for `replay`.
        keep_every: likewise.
        in_flight: likewise, of each stream; for none of them if empty.

    Returns:
        The runs, in the order of the streams.
    """
    with no_collections(), ThreadPoolExecutor(len(streams)) as pool:
        start_s = time.perf_counter() + LEAD_S
        own = {"start_s": start_s, "keep_every": keep_every}
        limits = in_flight or [None] * len(streams)
        sent = [
            pool.submit(replay, engine, targets, stream, deadline_s, **own, in_flight=n)
            for stream, n in zip(streams, limits, strict=True)
        ]
        return [run.result() for run in sent]


def saturate(
    engine: stfuse.Engine,
    targets: Sequence[Target],
    stream: Stream,
    seconds: float,
    window: int = WINDOW,
    *,
    keep_every: int = 1,
) -> Run:
    """Send a stream closed loop: as fast as answers come, ``window`` outstanding.

    Args:
        engine: has a job for every target.
        targets: in the order that the stream's indices mean.
        stream: what to send; its times are not used.
        seconds: how long to send, unless the stream ends before.
        window: the most requests without an answer at any time.
        keep_every: as for `replay`.

    Returns:
        The run, with those requests of the stream that were sent. Latencies in it
        count from the submission. Outputs that were not kept are None.
    """
    sender = _Sender(engine, targets, stream, time.perf_counter, keep_every)
    num_refused = 0
    with no_collections():
        now_s = start_s = time.perf_counter()
        while now_s - start_s < seconds and len(sender.sent_s) < len(stream.due_s):
            if len(sender.sent_s) - num_refused - len(sender.done) >= window:
                # Refill in bursts: to be woken by every answer would cost the engine
                # the interpreter, the more the fewer answers a step gives.
                time.sleep(REFILL_S)
            else:
                # No deadline: a request that waits long must be answered, not expire.
                sender.send(now_s, ANSWER_TIMEOUT_S)
                num_refused += sender.futures[-1] is None
            now_s = time.perf_counter()
        stop_s = time.perf_counter()
        outputs, done_s = sender.answers()
    sent_s = np.array(sender.sent_s)
    sent = slice(len(sent_s))
    warm_s = start_s + WARM_UP_SHARE * (stop_s - start_s)
    num_answered = np.sum((done_s > warm_s) & (done_s <= stop_s))
    asked = Stream(sent_s - start_s, stream.tenants[sent], stream.rows[sent])
    rate = num_answered / (stop_s - warm_s)
    return Run(asked, sent_s - start_s, done_s - sent_s, outputs, rate, start_s)
