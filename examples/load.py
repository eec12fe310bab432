"""Request streams, and two ways to send them: as they come, and as fast as possible.

Axes: R requests, C classes. Times are seconds from the start of a stream.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

import stfuse
from examples.digits_tenants import NUM_HELD_OUT, Tenant

ANSWER_TIMEOUT_S = 60.0
REFILL_S = 0.002  # between looks at a full window
WARM_UP_SHARE = 0.2  # of a closed loop, sent but not counted


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """Who asks what, and when.

    Attributes:
        due_s: intended send times, ascending, float64 [R].
        tenants: index of the asking tenant, int [R].
        rows: index of the held-out row that it asks about, int [R].
    """

    due_s: np.ndarray
    tenants: np.ndarray
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What became of a stream.

    Attributes:
        stream: the requests that were sent.
        latency_s: from the *intended* send time to the answer, float64 [R]; infinite
            for requests that were refused or expired.
        answers: logits, float32 [R, C]; NaN for requests that were not answered.
        answered_per_s: answers per second, after the warm-up in a closed loop.
    """

    stream: Stream
    latency_s: np.ndarray
    answers: np.ndarray
    answered_per_s: float

    @property
    def is_answered(self) -> np.ndarray:
        """Which requests got an answer, bool [R]."""
        return np.isfinite(self.latency_s)


def poisson_zipf(
    rate: float, seconds: float, num_tenants: int, seed: int, exponent: float = 1.0
) -> Stream:
    """Make Poisson arrivals over tenants of very unequal popularity.

    Args:
        rate: mean requests per second, all tenants together.
        seconds: length of the stream.
        num_tenants: the k-th most popular one has weight ``k ** -exponent``; who is
            how popular is drawn too.
        seed: decides everything; the same draws serve every rate.
        exponent: of the Zipf law.

    Returns:
        About ``rate * seconds`` requests.
    """
    rng = np.random.default_rng(seed)
    weights = rng.permutation(np.arange(1, num_tenants + 1) ** -exponent)
    num_requests = max(1, round(rate * seconds))
    return Stream(
        np.cumsum(rng.exponential(1 / rate, num_requests)),
        rng.choice(num_tenants, num_requests, p=weights / weights.sum()),
        rng.integers(NUM_HELD_OUT, size=num_requests),
    )


class _Sender:
    """Sends requests of a stream to an engine, and keeps what comes back."""

    def __init__(
        self, engine: stfuse.Engine, tenants: Sequence[Tenant], stream: Stream
    ) -> None:
        self._submit = engine.submit
        self._names = [tenant.name for tenant in tenants]
        self._images = [
            [tenant.task.images[row : row + 1] for row in range(NUM_HELD_OUT)]
            for tenant in tenants
        ]
        self._requests = list(
            zip(stream.tenants.tolist(), stream.rows.tolist(), strict=True)
        )
        self.stream = stream
        self.futures: list[Future[Any] | None] = []
        self.done_s = [float("inf")] * len(self._requests)

    def send(self, i: int, deadline_s: float | None, on_done: Any = None) -> None:
        """Submit request ``i``; note when it is answered, or that it was refused."""
        tenant, row = self._requests[i]
        try:
            future = self._submit(
                self._names[tenant], self._images[tenant][row], deadline_s=deadline_s
            )
        except (stfuse.QueueFullError, stfuse.DeadlineError):
            self.futures.append(None)
        else:
            self.futures.append(future)
            future.add_done_callback(functools.partial(self._stamp, i))
            if on_done is not None:
                future.add_done_callback(on_done)

    def _stamp(self, i: int, _: Future[Any]) -> None:
        self.done_s[i] = time.perf_counter()

    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for everything sent; return answers [R, C] and times of answer [R]."""
        done_s = np.full(len(self.futures), np.inf)
        answers = np.full((len(self.futures), 10), np.nan, np.float32)
        for i, future in enumerate(self.futures):
            if future is None:
                continue
            error = future.exception(ANSWER_TIMEOUT_S)
            if error is None:
                answers[i] = future.result()[0]
                done_s[i] = self.done_s[i]
            elif not isinstance(error, stfuse.QueueFullError | stfuse.DeadlineError):
                raise error
        return answers, done_s


def replay(
    engine: stfuse.Engine,
    tenants: Sequence[Tenant],
    stream: Stream,
    deadline_s: float,
) -> Run:
    """Send a stream open loop: each request when it is due, whatever became of others.

    A sender that lags skips nothing: latency and deadline count from the intended time.

    Args:
        engine: has a job for every tenant.
        tenants: in the order that the stream's indices mean.
        stream: what to send.
        deadline_s: for every request, from its intended send time.

    Returns:
        The run, all requests of the stream in it.
    """
    sender = _Sender(engine, tenants, stream)
    gc.collect()
    gc.disable()  # thousands of kept futures would make a collection a long pause
    start_s = time.perf_counter() + 0.01
    for i, due_s in enumerate((start_s + stream.due_s).tolist()):
        now_s = time.perf_counter()
        if now_s < due_s:
            time.sleep(due_s - now_s)
            now_s = time.perf_counter()
        sender.send(i, max(due_s + deadline_s - now_s, 1e-4))
    answers, done_s = sender.answers()
    gc.enable()
    latency_s = done_s - start_s - stream.due_s
    num_answered = np.isfinite(latency_s).sum()
    end_s = np.max(done_s, initial=start_s, where=np.isfinite(done_s))
    return Run(stream, latency_s, answers, num_answered / max(end_s - start_s, 1e-9))


def saturate(
    engine: stfuse.Engine,
    tenants: Sequence[Tenant],
    stream: Stream,
    seconds: float,
    window: int = 512,
) -> Run:
    """Send a stream closed loop: as fast as answers come, ``window`` outstanding.

    Args:
        engine: has a job for every tenant.
        tenants: in the order that the stream's indices mean.
        stream: what to send; its times are not used.
        seconds: how long to send, unless the stream ends before.
        window: the most requests without an answer at any time.

    Returns:
        The run, with those requests of the stream that were sent. Latencies in it
        count from the submission.
    """
    sender = _Sender(engine, tenants, stream)
    done: list[Future[Any]] = []
    sent_s: list[float] = []
    num_refused = 0
    gc.collect()
    gc.disable()
    now_s = start_s = time.perf_counter()
    while now_s - start_s < seconds and len(sent_s) < len(stream.due_s):
        if len(sent_s) - num_refused - len(done) >= window:
            # Refill in bursts: to be woken by every answer would cost the engine the
            # interpreter, the more the fewer answers a step gives.
            time.sleep(REFILL_S)
        else:
            # No deadline: a request that waits long must be answered, not expire.
            sender.send(len(sent_s), ANSWER_TIMEOUT_S, done.append)
            sent_s.append(now_s)
            num_refused += sender.futures[-1] is None
        now_s = time.perf_counter()
    stop_s = time.perf_counter()
    answers, done_s = sender.answers()
    gc.enable()
    sent = slice(len(sent_s))
    warm_s = start_s + WARM_UP_SHARE * (stop_s - start_s)
    num_answered = np.sum((done_s > warm_s) & (done_s <= stop_s))
    return Run(
        Stream(np.array(sent_s) - start_s, stream.tenants[sent], stream.rows[sent]),
        done_s - np.array(sent_s),
        answers,
        num_answered / (stop_s - warm_s),
    )
