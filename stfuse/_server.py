"""The device thread's work: decide, stage, launch, read, answer.

Rules:
    Everything here is guarded by ``server.lock``; only launches and reads run outside
    it, on the one device thread, with at most two steps in flight.
    A request is answered once, by this thread, after its future said that it runs.
    A failed step is run again by halves until the request that breaks it stands alone.
    What others want done on the device (a swap, a new lane) is a command: it runs
    between two steps.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from stfuse import _flight, _lane
from stfuse._cache import CostTable
from stfuse._errors import (
    ClosedError,
    DeadlineError,
    DeviceError,
    QueueFullError,
)
from stfuse._flight import Flight, Request, Tenant, halves, only
from stfuse._inputs import Checked
from stfuse._lane import Lane
from stfuse._metrics import Metrics
from stfuse._scheduler import Scheduler
from stfuse._types import (
    Batch,
    Bucket,
    Cancel,
    Clock,
    Device,
    Install,
    Leave,
    Ready,
    Submit,
)

CLOSED = "`stfuse.Engine`: the engine is closed; build a new one."
_LATE = "the request's deadline passed before it could start"
_MAX_IN_FLIGHT = 2


class Server:
    """Requests, lanes, and the loop that serves them.

    Args:
        scheduler: decides.
        device: computes.
        clock: seconds; never goes back.
    """

    def __init__(self, scheduler: Scheduler, device: Device, clock: Clock) -> None:
        """Start with nothing to serve."""
        self.lock = threading.Condition()
        self.scheduler = scheduler
        self.device = device
        self.clock = clock
        self.tenants: dict[str, Tenant] = {}
        self.lanes: dict[str, Lane] = {}
        self.metrics = Metrics()
        self.costs = CostTable()
        self.is_closed = False
        self._is_stopping = self._is_stopped = False
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._requests: dict[int, Request] = {}
        self._retries: deque[Batch] = deque()
        self._in_flight: deque[Flight] = deque()
        self._num_requests = 0
        self._read_s = 0.0
        self._thread: threading.Thread | None = None
        subscribe = getattr(clock, "subscribe", None)
        self._is_clock_real = subscribe is None
        if subscribe is not None:
            subscribe(self.wake)

    def wake(self) -> None:
        """Let the device thread look again."""
        with self.lock:
            self.lock.notify_all()

    def stop(self) -> None:
        """Let `serve` return once everything is answered."""
        with self.lock:
            self._is_stopping = True
            self.lock.notify_all()

    def on_device_thread(self) -> bool:
        """Return whether the caller is a future's callback on the device thread."""
        return threading.current_thread() is self._thread

    def command(self, run: Callable[[], Any]) -> Future[Any]:
        """Have something done on the device thread, between two steps."""
        done: Future[Any] = Future()
        if self.on_device_thread():
            _resolve(done, run)
            return done
        with self.lock:
            if self._is_stopped:
                done.set_exception(ClosedError(CLOSED))
                return done
            self._commands.append((run, done))
            self.lock.notify_all()
        return done

    def submit(
        self, tenant: Tenant, inputs: Checked, deadline_s: float | None
    ) -> Future[Any]:
        """Queue a request.

        Raises:
            QueueFullError, DeadlineError, ClosedError: from the scheduler.
        """
        future: Future[Any] = Future()
        with self.lock:
            if self.is_closed:
                raise ClosedError(CLOSED, jobs=(tenant.job.name,))
            number = self._num_requests = self._num_requests + 1
            now_s = self.clock()
            until_s = None if deadline_s is None else now_s + deadline_s
            name = tenant.job.name
            try:
                self.scheduler.handle(
                    Submit(number, name, inputs.rows, now_s, until_s, inputs.length)
                )
            except (QueueFullError, DeadlineError):
                self.metrics.count(name, "rejected")
                raise
            self._requests[number] = Request(
                tenant=tenant,
                leaves=inputs.leaves,
                rows=inputs.rows,
                submitted_s=now_s,
                deadline_s=until_s,
                future=future,
                length=inputs.length,
                out_sizes=inputs.out_sizes,
            )
            tenant.outstanding += 1
            self.lock.notify_all()
        future.add_done_callback(lambda f: f.cancelled() and self._cancelled(number))
        return future

    def serve(self) -> None:
        """Run until told to stop and everything is answered: the device thread."""
        self._thread = threading.current_thread()
        while True:
            with self.lock:
                work = self._next()
            if work is None:
                return
            commands, batch, expired = work
            for run, done in commands:
                _resolve(done, run)
            if expired:
                self._finish([(n, DeadlineError(_LATE)) for n in expired], "expired")
            if batch is not None:
                self._launch(batch)
            elif self._in_flight and not commands:
                self._read(self._in_flight.popleft())

    def fail_all(self, error: Exception, names: Sequence[str] | None = None) -> None:
        """Give waiting requests (of some tenants) an error instead of an answer."""
        with self.lock:
            wanted = set(self.tenants if names is None else names)
            numbers = [n for name in wanted for n in self.scheduler.queued(name)]
            for number in numbers:
                self.scheduler.handle(Cancel(number))
        self._finish([(number, error) for number in numbers], "failed")

    def measure(self, lane: Lane, bucket: Bucket) -> float:
        """Run a compiled bucket on sample inputs; return its predicted seconds."""
        step_s = min(self._time_step(lane, bucket) for _ in range(3))
        return self._predict(lane, bucket, step_s)

    def start(self, lane: Lane, bucket: Bucket) -> None:
        """Let the scheduler use a compiled bucket of a serving lane: a command."""
        step_s = self.measure(lane, bucket)
        with self.lock:
            if self.lanes.get(lane.name) is lane:
                self.scheduler.handle(Ready(lane.name, bucket, step_s))

    def refuse(self, tenant: Tenant, error: Exception) -> None:
        """Drop a tenant that cannot be served, and fail what it has waiting."""
        name = tenant.job.name
        with self.lock:
            tenant.is_leaving = True
            self.scheduler.handle(Leave(name))
        if not tenant.ready.done():
            tenant.ready.set_exception(error)
        self.fail_all(error, [name])
        if not tenant.outstanding:
            self.depart(tenant)

    def _predict(self, lane: Lane, bucket: Bucket, step_s: float) -> float:
        return self.costs.record((lane.name, lane.capacities, bucket), step_s)

    def _time_step(self, lane: Lane, bucket: Bucket) -> float:
        slots, inputs = _lane.sample(lane, bucket)
        start_s = self.clock()
        step = lane.steps[bucket]
        self.device.read(self.device.launch(step, lane.bank.stacks, slots, inputs))
        return max(self.clock() - start_s, 1e-6)

    def _next(self) -> tuple[list[Any], Batch | None, tuple[int, ...]] | None:
        """Wait for work, None for the end; the lock is held."""
        while True:
            commands = list(self._commands)
            self._commands.clear()
            batch, expired, wait_s = None, (), None
            if not commands and len(self._in_flight) < _MAX_IN_FLIGHT:
                if self._retries:
                    batch = self._retries.popleft()
                else:
                    now_s = self.clock()
                    decision = self.scheduler.decide(now_s)
                    batch, expired = decision.batch, decision.expired
                    if decision.wait_until_s is not None:
                        wait_s = max(decision.wait_until_s - now_s, 0.0)
            if commands or batch or expired or self._in_flight:
                return commands, batch, expired
            if self._is_stopping and not self.scheduler.num_queued:
                self._is_stopped = True
                return None
            # A simulated clock wakes us itself whenever it moves.
            self.lock.wait(wait_s if self._is_clock_real else None)

    def _launch(self, batch: Batch) -> None:
        """Stage and start a step."""
        numbers = [n for chunk in batch.chunks for n in chunk.requests]
        batch = only(batch, filter(self._is_running, numbers), self._requests)
        if not batch.chunks:
            return  # all of them were cancelled
        lane, bucket = self.lanes[batch.lane], batch.bucket
        if bucket not in lane.steps and len(batch.chunks) == 1:
            bucket = next(iter(lane.steps))  # a retry, in a lane rebuilt meanwhile
            batch = replace(batch, bucket=bucket)
        launched_s = self.clock()
        try:
            step = lane.steps[bucket]
            leaves_of = {
                n: self._requests[n].leaves for c in batch.chunks for n in c.requests
            }
            slots, inputs, placed = _lane.stage(lane, bucket, batch.chunks, leaves_of)
            outputs = self.device.launch(step, lane.bank.stacks, slots, inputs)
        except Exception as error:  # whatever a device raises is an outcome per job
            self._failed(batch, error)
            return
        self._in_flight.append(
            Flight(lane, batch, (slots, inputs), placed, outputs, launched_s)
        )

    def _is_running(self, number: int) -> bool:
        request = self._requests.get(number)
        if request is None:
            return False
        # A retried request is marked as running already.
        return request.future.running() or (
            request.future.set_running_or_notify_cancel()
        )

    def _read(self, flight: Flight) -> None:
        """Wait for a step and answer its requests."""
        try:
            outputs = self.device.read(flight.outputs)
        except Exception as error:  # see _launch
            self._failed(flight.batch, error)
            return
        now_s = self.clock()
        step_s = max(now_s - max(flight.launched_s, self._read_s), 1e-6)
        self._read_s = now_s
        lane, bucket = flight.lane, flight.batch.bucket
        prediction_s = self._predict(lane, bucket, step_s)
        record = _flight.record(flight, self._requests, now_s, step_s)
        answers = _flight.answers(flight, outputs, self._requests)
        _lane.release(lane, bucket, *flight.staged)
        with self.lock:
            if self.lanes.get(lane.name) is lane:
                self.scheduler.handle(Ready(lane.name, bucket, prediction_s))
            self.metrics.record(record)
            ended = self._forget(answers)
        self._resolve(ended)

    def _failed(self, batch: Batch, error: Exception) -> None:
        """Run a failed step again by halves; a request alone in it gets the error."""
        requests = [(c.tenant, n) for c in batch.chunks for n in c.requests]
        if len(requests) == 1:
            name, number = requests[0]
            failure = DeviceError(
                f"job '{name}': the step failed: {type(error).__name__}: {error}",
                jobs=(name,),
            )
            failure.__cause__ = error
            self._finish([(number, failure)], "failed")
            return
        self._retries.extend(halves(batch, self._requests))

    def _cancelled(self, number: int) -> None:
        with self.lock:
            self.scheduler.handle(Cancel(number))
        self._finish([(number, None)], "cancelled")

    def _finish(self, outcomes: Sequence[tuple[int, Any]], kind: str) -> None:
        """End requests that got no answer; ``kind`` says how they are counted."""
        with self.lock:
            ended = self._forget(outcomes)
            for request, _ in ended:
                self.metrics.count(request.tenant.job.name, kind)
        self._resolve(ended)

    def _forget(self, outcomes: Sequence[tuple[int, Any]]) -> list[tuple[Request, Any]]:
        """Take requests off the books, those that still are; the lock is held."""
        ended = []
        for number, outcome in outcomes:
            request = self._requests.pop(number, None)
            if request is not None:
                request.tenant.outstanding -= 1
                ended.append((request, outcome))
        return ended

    def _resolve(self, ended: Sequence[tuple[Request, Any]]) -> None:
        """Give futures their outcomes; their callbacks run here, without the lock."""
        for request, outcome in ended:
            future, tenant = request.future, request.tenant
            # A waiting future that its owner cancels right now stays cancelled.
            if future.running() or (
                not future.done() and future.set_running_or_notify_cancel()
            ):
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
            if tenant.is_leaving and not tenant.outstanding:
                self.depart(tenant)

    def depart(self, tenant: Tenant) -> None:
        """Free the slot of a tenant that has no requests left."""

        def free() -> None:
            if tenant.drained.done():
                return  # by now its name may be another's
            lane = self.lanes.get(tenant.lane)
            if lane is not None and tenant.is_placed:
                _lane.leave(lane, tenant.job.name)
                if not lane.places:
                    del self.lanes[tenant.lane]
                    self.costs.forget(tenant.lane)
                    with self.lock:
                        self.scheduler.handle(Install(tenant.lane, (), {}))
            with self.lock:
                self.tenants.pop(tenant.job.name, None)
                self.metrics.forget(tenant.job.name)
            closed = ClosedError(f"job '{tenant.job.name}' was removed")
            for waiting in (tenant.ready, *tenant.swaps):
                if not waiting.done():
                    waiting.set_exception(closed)
            tenant.drained.set_result(None)

        self.command(free)


def _resolve(done: Future[Any], run: Callable[[], Any]) -> None:
    try:
        done.set_result(run())
    except Exception as error:
        done.set_exception(error)
