"""The device thread's work: decide, stage, launch, read, answer.

Rules:
    Everything here is guarded by ``server.lock``; only launches and reads run outside
    it, on the one device thread, with at most two steps in flight; the second just
    before the first ends, unless a backlog fills it sooner.
    A request is answered once, by whoever takes it off the books.
    What others want done on the device (a swap, a new lane) is a command: it runs
    between two steps.
    Nothing that raises here ends the thread; `_faults` says what follows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax

from stfuse import _flight, _lane, _staging
from stfuse._answers import settle
from stfuse._books import Books
from stfuse._errors import ClosedError, DeadlineError, DeviceError, QueueFullError
from stfuse._faults import Faults
from stfuse._flight import Flight, Request, Tenant, is_served, only, rehomed
from stfuse._inputs import Checked
from stfuse._lane import Lane
from stfuse._members import Members
from stfuse._metrics import Metrics
from stfuse._scheduler import Scheduler
from stfuse._turns import OwnTurns
from stfuse._types import (
    Batch,
    Bucket,
    Clock,
    Decision,
    Device,
    Ready,
    StepRecord,
    Submit,
)

CLOSED = "`stfuse.Engine`: the engine is closed; build a new one."
DROPPED = "the engine was closed before this was done"
_LATE = "the request's deadline passed before it could start"
_MAX_IN_FLIGHT = 2
_LEAD = 2.0  # times what the host took for the last step
_MOST_WAIT_S = 0.1  # should a step be done long before it was ever seen to be
_HOUR_S = 3600.0  # then it looks again: a condition does not wait for ever
_Command = tuple[Callable[[], Any], Future[Any]]
_Work = _Command | Decision | Flight


class Server:
    """Requests, lanes, and the loop that serves them.

    Args:
        scheduler: decides.
        device: computes.
        clock: seconds; never goes back.
    """

    def __init__(self, scheduler: Scheduler, device: Device, clock: Clock) -> None:
        """Start with nothing to serve."""
        # Two conditions of one lock: a submit must wake the device thread only.
        self._inner = threading.RLock()
        self.lock = threading.Condition(self._inner)
        self._work = threading.Condition(self._inner)
        self._is_idle = False
        self.is_wide: bool = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        self.scheduler, self.device, self.clock = scheduler, device, clock
        self.metrics = Metrics()
        self.books = Books(
            self.lock, scheduler, self.metrics, lambda t: self.members.depart(t)
        )
        self._in_flight: deque[Flight] = deque()
        self.faults = Faults(
            self.lock, clock, device, self.books, self._in_flight, self.metrics
        )
        self.observe: Callable[[StepRecord], None] = lambda record: None
        own = self.books, self.metrics, self.faults, self.command
        self.members = Members(self.lock, scheduler, *own, device)
        self.tenants, self.lanes = self.members.tenants, self.members.lanes
        self.is_closed = self._is_stopping = self._is_stopped = False
        self._has_served = True  # a step, since the loop last began
        self._commands: deque[_Command] = deque()
        self._is_command_next = True
        self._decide_s, self._answer_s, self._num_launches = 0.0, 0.0, 0
        self.turns = OwnTurns()
        self.read_s = float("-inf")  # when the last step was read
        self._thread: threading.Thread | None = None
        subscribe = getattr(clock, "subscribe", None)
        self.is_clock_real = subscribe is None
        if subscribe is not None:
            subscribe(self._clock_moved)

    def wake(self) -> None:
        """Let the device thread look again."""
        with self.lock:
            self._work.notify()

    def _clock_moved(self) -> None:
        """Let all threads look again: they do not wait for a simulated clock."""
        with self.lock:
            self._work.notify()
            self.lock.notify_all()

    def stop(self) -> None:
        """Let `serve` return once everything is answered."""
        with self.lock:
            self._is_stopping = True
            self._work.notify()

    def on_own_thread(self) -> bool:
        """Return whether the caller is a future's callback."""
        is_callback = self.books.callbacks.is_own_thread()
        return is_callback or threading.current_thread() is self._thread

    def command(self, run: Callable[[], Any]) -> Future[Any]:
        """Have something done on the device thread, between two steps."""
        done: Future[Any] = Future()
        if threading.current_thread() is self._thread:
            self._run(run, done)
            return done
        with self.lock:
            if self._is_stopped:
                done.set_exception(ClosedError(CLOSED))
                return done
            self._commands.append((run, done))
            self._work.notify()
        return done

    def submit(
        self, tenant: Tenant, inputs: Checked, deadline_s: float | None
    ) -> Future[Any]:
        """Queue a request.

        Raises:
            QueueFullError, DeadlineError, ClosedError: from the scheduler.
            DeviceError: the device is lost, or the job in quarantine.
        """
        name, faults, num_bytes = tenant.job.name, self.faults, inputs.num_bytes
        with self._inner:  # the lock itself: its condition is one more call
            if self.is_closed:
                raise ClosedError(CLOSED, jobs=(name,))
            if faults.state.reason or faults.quarantine:
                faults.admit(tenant)
            now_s = self.clock()
            number = self.books.next_number()
            until_s = None if deadline_s is None else now_s + deadline_s
            event = Submit(
                number, name, inputs.rows, now_s, until_s, inputs.length, num_bytes
            )
            try:
                self.scheduler.submit(event)
            except (QueueFullError, DeadlineError) as error:
                is_full = isinstance(error, QueueFullError)
                self.metrics.count(name, "queue_full" if is_full else "predicted_miss")
                raise
            future = self.books.open(number, tenant, inputs, now_s, until_s)
            tenant.last_request = number
            if tenant.is_on_host:
                self.members.residency.want(tenant)
                self._work.notify()
            if self._is_idle and not self.scheduler.is_resting:
                self._is_idle = False
                self._work.notify()
        return future

    def serve(self) -> None:
        """Run until told to stop and everything is answered: the device thread."""
        self._thread = threading.current_thread()
        while True:
            try:
                with jax.enable_x64(self.is_wide):
                    return self._serve()
            except BaseException as error:  # only `stop` may end this thread
                self.faults.restarted(error, is_again=not self._has_served)
                self._has_served = False

    def _serve(self) -> None:
        while True:
            requests: dict[int, Request] = {}
            with self.lock:
                work = self._next()
                if isinstance(work, Decision) and work.batch is not None:
                    requests = self.books.start(work.batch)
            if work is None:
                return
            if isinstance(work, Flight):
                self._read(work)
            elif isinstance(work, Decision):
                if work.expired:
                    late = [(n, DeadlineError(_LATE)) for n in work.expired]
                    self.books.finish(late, "expired")
                if work.batch is not None:
                    self._launch(work.batch, requests)
            else:
                self._run(*work)

    def _next(self) -> _Work | None:
        """Wait for work, None for the end; the lock is held."""
        while True:
            work, wait_s = self._choose()
            if work is not None:
                return work
            self._is_command_next = True
            if self._in_flight:
                return self._in_flight.popleft()
            if self._commands:
                continue
            if self._is_stopping:
                if self.faults.state.reason or not self.scheduler.num_queued:
                    self._is_stopped = True
                    return None
                work = self._stranded()
                if work is not None:
                    return work
            # A simulated clock wakes us itself whenever it moves.
            self._is_idle = True
            self._work.wait(wait_s if self.is_clock_real else None)
            self._is_idle = False

    def _choose(self) -> tuple[_Work | None, float | None]:
        """Return what to start, or when to look again, seconds."""
        faults = self.faults
        # One until the next step was read: whoever has many lets requests pass.
        if self._commands and self._is_command_next:
            self._is_command_next = False
            return self._commands.popleft(), None
        if faults.state.reason:
            if faults.state.is_final:
                return None, None
            wait_s = faults.state.probe_in_s(self.clock())
            return (None, wait_s) if wait_s else ((faults.probe, Future()), None)
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            return None, None
        if self._in_flight:
            self._wait_for_company(self._in_flight[-1])
        return self._decide()

    def _wait_for_company(self, last: Flight) -> None:
        """Wait until the next step has to be staged to follow the last at once."""
        if self.is_clock_real and not self.scheduler.has_backlog:
            step_s = self.members.fastest_s(last.lane, last.batch.bucket)
            lead_s = _LEAD * sum(last.host_s)
            until_s = max(last.launched_s, self.read_s) + step_s - lead_s
            wait_s = min(until_s - self.clock(), _MOST_WAIT_S)
            if wait_s > 0:
                self._work.wait(wait_s)

    def _decide(self) -> tuple[_Work | None, float | None]:
        """Return what to start now, or how long to wait; the lock is held."""
        self._decide_s, retries = 0.0, self.faults.retries
        if retries:
            batch = retries.popleft()
            if is_served(batch, self.lanes.get(batch.lane)):
                return Decision(batch), None
            return (partial(self._rehome, batch), Future()), None
        residency = self.members.residency
        move = residency.choose(self._num_launches, not self._in_flight)
        if move is not None:
            return (partial(residency.carry_out, move), Future()), None
        if residency.needs_quiet:
            return None, None
        now_s = self.clock()
        decision = self.scheduler.decide(now_s)
        if decision.batch or decision.expired:
            self._decide_s = self.clock() - now_s
            return decision, None
        until_s = decision.wait_until_s
        if until_s is None:
            return None, None
        return None, min(max(until_s - now_s, 0.0), _HOUR_S)

    def _stranded(self) -> _Command | None:
        """Return what fails requests of no lane: at the end nobody builds one."""
        names = [n for n, t in self.tenants.items() if not t.is_placed]
        if not any(map(self.scheduler.queued, names)):
            return None
        return partial(self.fail_all, ClosedError(DROPPED), names), Future()

    def _run(self, run: Callable[[], Any], done: Future[Any]) -> None:
        """Carry out a command; its error is its caller's, unless it cost a lane."""
        if not done.set_running_or_notify_cancel():
            return
        try:
            settle(done, run())
        except Exception as error:
            for lane in list(self.lanes.values()):
                if not _lane.is_intact(lane):
                    self.members.lose_lane(lane)
            settle(done, error)

    def fail_all(self, error: ClosedError, names: Sequence[str] | None = None) -> None:
        """Give waiting requests (of some tenants) an error instead of an answer."""
        with self.lock:
            names = list(self.tenants) if names is None else names
        self.books.fail_queued(error, names)

    def measure(self, lane: Lane, bucket: Bucket) -> float:
        """Run a compiled bucket once on sample inputs, a command; return its seconds.

        Once, so that no request has to wait for more than one such step.
        """
        step_s = self._time_step(lane, bucket)
        lane.step_s[bucket] = min(lane.step_s.get(bucket, step_s), step_s)
        return lane.step_s[bucket]

    def start(self, lane: Lane, bucket: Bucket) -> None:
        """Let the scheduler use a measured bucket of a serving lane: a command."""
        self._predict(self.members.measured(lane, bucket, lane.step_s[bucket]))

    def _predict(self, predictions: Sequence[Ready]) -> None:
        """Tell the scheduler what steps are predicted to take."""
        with self.lock:
            for ready in predictions:
                self.scheduler.handle(ready)

    def _time_step(self, lane: Lane, bucket: Bucket) -> float:
        slots, inputs = _staging.sample(lane, bucket)
        start_s = self.clock()
        step = lane.steps[bucket]
        self.device.read(self.device.launch(step, lane.bank.stacks, slots, inputs))
        return max(self.clock() - start_s, 1e-6)

    def _launch(self, batch: Batch, requests: dict[int, Request]) -> None:
        """Stage and start a step of those requests that were not cancelled."""
        begun_s = self.clock()
        if len(requests) < sum([len(chunk.requests) for chunk in batch.chunks]):
            batch = only(batch, requests, requests)
            if not requests:
                return
        try:
            flight = self._start(batch, requests, begun_s)
        except Exception as error:  # whatever a device raises is an outcome per job
            self.faults.failed(batch, requests, error)
        else:
            self._in_flight.append(flight)

    def _rehome(self, batch: Batch) -> None:
        """Run a step where its tenants are now; fail what no lane serves."""
        moved = rehomed(batch, list(self.lanes.values()))
        self.faults.retries.extendleft(moved)
        found = {n for b in moved for c in b.chunks for n in c.requests}
        lost = DeviceError(f"lane '{batch.lane}' was lost while a step ran in it")
        numbers = [n for c in batch.chunks for n in c.requests if n not in found]
        self.books.finish([(number, lost) for number in numbers], "failed")

    def _start(
        self, batch: Batch, requests: dict[int, Request], begun_s: float
    ) -> Flight:
        lane, bucket = self.lanes[batch.lane], batch.bucket
        leaves_of = {number: r.leaves for number, r in requests.items()}
        staged, placed = _staging.stage(lane, bucket, batch.chunks, leaves_of)
        launched_s = self.clock()
        number = self._num_launches = self._num_launches + 1
        trace = jax.profiler.StepTraceAnnotation("stfuse_step", step_num=number)
        with trace, self.turns.watched():
            step = lane.steps[bucket]
            outputs = self.device.launch(step, lane.bank.stacks, *staged[:2])
        host_s = self._decide_s, launched_s - begun_s, self.clock() - launched_s
        return Flight(
            lane, batch, requests, staged, placed, outputs, launched_s, host_s
        )

    def _read(self, flight: Flight) -> None:
        """Wait for a step and answer its requests."""
        begun_s, batch = self.clock(), flight.batch
        self.metrics.fold_some()  # while the device works
        fold_s = self.clock() - begun_s
        try:
            outputs = self.device.read(flight.outputs)
        except Exception as error:  # see _launch
            self.faults.failed(batch, flight.requests, error)
            return
        now_s = self.clock()
        step_s = max(now_s - max(flight.launched_s, self.read_s), 1e-6)
        self.read_s = now_s
        lane, bucket = flight.lane, batch.bucket
        host_s = sum(flight.host_s) + fold_s + self._answer_s  # that of the step before
        predictions = self.members.measured(lane, bucket, step_s, host_s)
        record = _flight.record(flight, now_s, step_s)
        answers = _flight.answers(flight, outputs)
        _staging.release(lane, bucket, flight.staged)
        with self.lock:
            self._predict(predictions)
            self.metrics.record(record)
            self.observe(record)
            ended = self.books.close(answers)
        self._has_served = True
        if self.faults.quarantine:
            self.faults.answered(batch)
        self.books.resolve(ended)
        self._answer_s = self.clock() - now_s
        self.metrics.add_host(*flight.host_s, self._answer_s, fold_s)
