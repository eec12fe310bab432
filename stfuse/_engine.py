"""Engine: serve jobs under a policy. The only file that starts threads.

Rules:
    Callers validate and queue; one thread owns the device; one thread builds lanes;
    one runs the callbacks of futures, so that a slow one holds up nothing else.
    A request is refused where it is made (an exception) or answered through its future.
    ``add`` and ``remove`` never disturb the other jobs; ``swap`` returns once every
    later request is sure to see the new weights.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from absl import logging

from stfuse import _cache, _options, _supervise
from stfuse._admission import Bounds
from stfuse._builder import Builder
from stfuse._device import JaxDevice
from stfuse._errors import (
    ClosedError,
    DeadlineError,
    DeviceError,
    JobError,
    QueueFullError,
    RequestError,
)
from stfuse._flight import Tenant
from stfuse._health import Health
from stfuse._inputs import check_seconds
from stfuse._job import Job
from stfuse._metrics import Snapshot
from stfuse._scheduler import Scheduler
from stfuse._server import CLOSED, DROPPED, Server
from stfuse._swap import prepared, writing
from stfuse._turns import REFUSALS
from stfuse._types import Clock, Device, Drain, Join, Leave


class Engine:
    """Serves jobs on one device; safe to call from many threads.

    Args:
        policy: ``"space-time"`` fuses many tenants' requests into one step;
            ``"exclusive"`` runs one model at a time, its own requests batched;
            ``"time"`` runs one request at a time, round robin.
        max_batch_size: most rows of one request, and of one slot of a step.
        batch_sizes: rows of a slot that steps are compiled for, beside
            ``max_batch_size``; None for 1, 2, 4, ... The fewer, the sooner ready.
        max_slots: most slots of one step.
        max_queue_delay_s: how long a request may wait for company, seconds, if its
            step would leave nobody waiting: fewer, fuller steps, and less for the host.
        max_queue_size: most requests that one job may have waiting.
        max_queue_rows: most rows that one job may have waiting; None: no such bound.
        max_queue_bytes: most bytes of inputs that one job may have waiting; or None.
        max_total_rows: most rows that all jobs together may have waiting; or None.
        max_total_bytes: most bytes of inputs that all jobs together may have waiting.
        strict_shares: whether a job that is beyond its share, its weight over that of
            all jobs, gets only two slots that the others' steps leave free, and short
            steps now and then: a flood makes nobody's steps longer, and waits.
        max_device_bytes: most device memory to use; None for all there is. Tenants
            beyond it live on the host while they have no requests.
        switch_interval_s: until `close`, the longest turn of a busy thread of this
            process (`sys.setswitchinterval`): the device waits for it at each step.
            None: on an accelerator 2 ms, or 0.5 while somebody uses that up.
        device: a ``jax.Device``, or an object like `stfuse.testing.FakeDevice`; None
            for JAX's default device.
        clock: returns seconds and never goes back.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import numpy as np
        >>> job = Job("double", lambda p, x: p * x, np.float32(2), np.ones((1, 3), "f"))
        >>> with Engine() as engine:
        ...     ready = engine.add(job)
        ...     engine.infer("double", np.ones((1, 3), "f")).tolist()
        [[2.0, 2.0, 2.0]]
    """

    def __init__(
        self,
        *,
        policy: str = "space-time",
        max_batch_size: int = 8,
        batch_sizes: Sequence[int] | None = None,
        max_slots: int = 64,
        max_queue_delay_s: float = 0.0,
        max_queue_size: int = 1024,
        max_queue_rows: int | None = None,
        max_queue_bytes: int | None = None,
        max_total_rows: int | None = None,
        max_total_bytes: int | None = 1 << 30,
        strict_shares: bool = False,
        max_device_bytes: int | None = None,
        switch_interval_s: float | None = None,
        device: Any = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Start its threads."""
        _options.check_sizes(max_batch_size=max_batch_size, max_slots=max_slots)
        _options.check_times(max_queue_delay_s, clock)
        self._max_batch_size = max_batch_size
        chosen = _options.policy_of(policy)
        own_most = (max_queue_size, max_queue_rows, max_queue_bytes)
        scheduler = Scheduler(
            chosen,
            max_batch_size=max_batch_size,
            max_queue_delay_s=max_queue_delay_s,
            bounds=Bounds(*own_most, max_total_rows, max_total_bytes),
            strict_shares=strict_shares,
        )
        on: Device = device if hasattr(device, "launch") else JaxDevice(device)
        self._server = Server(scheduler, on, clock)
        self._builder = Builder(
            self._server,
            chosen,
            rows=_options.rows_of(batch_sizes, max_batch_size),
            max_slots=max_slots,
            max_device_bytes=max_device_bytes,
        )
        self._compiles_before = _cache.STEPS.num_compiles
        self._server.turns = _options.turns_of(switch_interval_s, on)
        self._threads = _started(self._server, self._builder)

    def add(self, job: Job) -> Future[None]:
        """Take a job's requests from now on.

        It is answered as soon as a step that serves it is compiled, off the path of
        the others' requests.

        Args:
            job: its name must be new here; its params must be arrays.

        Returns:
            A future that resolves when the job is served at full speed (every bucket
            of its lane compiled and measured), or carries a `DeviceError` that says
            why it was refused.

        Raises:
            JobError: no job, a name that is taken, or params without values.
            ClosedError: the engine is closed.
        """
        if not isinstance(job, Job):
            found = type(job).__name__
            raise JobError(
                f"`stfuse.Engine.add`: found a {found}; pass a `stfuse.Job`."
            )
        lane = self._builder.lane_of(job.name)
        try:
            member = prepared("add", job, job.params, self._server)
        except DeviceError as error:
            refused: Future[None] = Future()
            refused.set_exception(error)
            return refused
        tenant = Tenant(job, member, lane)
        with self._server.lock:
            if self._server.is_closed:
                raise ClosedError(CLOSED, jobs=(job.name,))
            if job.name in self._server.tenants:
                raise JobError(
                    f"`stfuse.Engine.add`: job '{job.name}' is here already; remove it "
                    f"first, swap its params, or choose another name.",
                    jobs=(job.name,),
                )
            self._server.tenants[job.name] = tenant
            self._server.scheduler.handle(Join(job.name, job.weight))
        logging.info("stfuse: job '%s' added", job.name)
        self._builder.request(lane)
        return tenant.ready

    def remove(self, name: str) -> None:
        """Take no more requests for a job, answer those it has, and forget it.

        Args:
            name: the job; free to be used again when this returns.

        Raises:
            JobError: no such job.
        """
        self._check_thread("remove")
        tenant = self._tenant("remove", name, JobError)
        with self._server.lock:
            if not tenant.is_leaving:
                tenant.is_leaving = True
                self._server.scheduler.handle(Leave(name))
                self._server.wake()  # what it has waiting waits for nobody any more
            is_idle = not tenant.outstanding
        if is_idle:
            self._server.members.depart(tenant)
        tenant.drained.result()

    def swap(self, name: str, params: Any) -> None:
        """Replace a job's weights while it is served.

        Every answer comes from one generation of weights; what is submitted after this
        returns sees the new one.

        Args:
            name: the job.
            params: pytree like the job's params.

        Raises:
            JobError: no such job, or params unlike the job's; the old ones stay.
            DeviceError: the weights could not be prepared or written, or the new step,
                needed when a shared leaf stops being equal, not be built; the old
                weights stay.
        """
        tenant = self._tenant("swap", name, JobError)
        write = writing(self._server, self._builder, tenant, params)
        waiting = self._server.command(write).result()
        if waiting is not None:
            self._check_thread("swap")
            waiting.result()
            self._server.faults.release(name)

    def submit(
        self, name: str, inputs: Any, *, deadline_s: float | None = None
    ) -> Future[Any]:
        """Queue a request.

        Args:
            name: the job.
            inputs: pytree like the job's example, with 1 to ``max_batch_size`` rows;
                copied, so the caller may reuse its arrays.
            deadline_s: seconds from now by which it must have started; while more
                waits than a step holds, by which it must be answered; None for the
                job's ``slo_s``.

        Returns:
            A future of the outputs, NumPy arrays of the caller's own. It may carry a
            `DeadlineError`, `DeviceError` or `ClosedError`; cancelling it frees its
            place.

        Raises:
            RequestError: no such job, or malformed inputs.
            QueueFullError: a queue has no room; ``retry_after_s`` says when it may.
            DeadlineError: the deadline has passed, or what waits before takes longer.
                A thread that is refused again and again rests 0.1 ms for each, some
                eight at a time: it is no burden then.
            ClosedError: the engine is closed, or the job is being removed.
            DeviceError: the device is lost, or the job in quarantine since its
                requests failed alone three times in a row.
        """
        call = "stfuse.Engine.submit"
        tenant = self._tenant("submit", name, RequestError)
        checked = tenant.form.check(inputs, self._max_batch_size, call=call)
        until_s = tenant.job.slo_s
        if deadline_s is not None:
            until_s = check_seconds(tenant.job, deadline_s, call=call)
        try:
            return self._server.submit(tenant, checked, until_s)
        except (QueueFullError, DeadlineError):
            if rest_s := REFUSALS.rest_s(time.perf_counter()):
                time.sleep(rest_s)
            raise

    def infer(self, name: str, inputs: Any, *, timeout_s: float | None = None) -> Any:
        """Submit and wait.

        Args:
            name: the job.
            inputs: as for `submit`.
            timeout_s: how long to wait, and the request's deadline; None for as long
                as it takes.

        Returns:
            The outputs.

        Raises:
            DeadlineError: no answer in time; the request is given up.
            RequestError, QueueFullError, ClosedError, DeviceError: as for `submit`.
        """
        self._check_thread("infer")
        future = self.submit(name, inputs, deadline_s=timeout_s)
        try:
            return future.result(_options.wait_of(timeout_s))
        except TimeoutError as error:
            raise self._too_late(name, timeout_s, future, error) from None

    async def infer_async(
        self, name: str, inputs: Any, *, timeout_s: float | None = None
    ) -> Any:
        """Submit and await the outputs. Cancelling the task frees its place.

        Args:
            name: the job.
            inputs: as for `submit`.
            timeout_s: as for `infer`.

        Returns:
            The outputs.

        Raises:
            DeadlineError: no answer in time; the request is given up.
            RequestError, QueueFullError, ClosedError, DeviceError: as for `submit`.
        """
        future: Any = self.submit(name, inputs, deadline_s=timeout_s)
        future.is_awaited = True
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
        except TimeoutError as error:
            raise self._too_late(name, timeout_s, future, error) from None

    def stats(self) -> Snapshot:
        """Return what was served so far, and by whom."""
        compiles = _cache.STEPS.num_compiles - self._compiles_before
        return _supervise.snapshot(self._server, compiles)

    def health(self, *, timeout_s: float = 1.0) -> Health:
        """Have a row with a known answer computed, between two steps.

        A device that was lost and answers again is taken back into service.

        Args:
            timeout_s: how long to wait for the answer, seconds.

        Returns:
            What was found. This never raises, and never waits longer.
        """
        return _supervise.check_health(self._server, timeout_s)

    def close(self, drain: bool = True, *, timeout_s: float | None = None) -> None:
        """Stop taking requests, end those there are, and join the threads.

        Args:
            drain: whether to answer what is queued; if not, it fails with
                `ClosedError`. A second close is harmless.
            timeout_s: after so many seconds, what is left fails with `ClosedError` and
                a thread that is stuck in the device is left behind; None to wait.
        """
        self._check_thread("close")
        server, closed = self._server, ClosedError(DROPPED)
        with server.lock:
            server.is_closed = True
            server.scheduler.handle(Drain())
        if not drain:
            server.fail_all(closed)
        _supervise.end(server, self._builder, self._threads, timeout_s)

    def __enter__(self) -> Engine:
        """Return the engine."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        """Close; drain unless an exception is on its way."""
        self.close(drain=kind is None)

    def _tenant(self, call: str, name: str, error: type) -> Tenant:
        tenant = self._server.tenants.get(name) if isinstance(name, str) else None
        if tenant is None:
            names = ", ".join(list(self._server.tenants)[:8]) or "no jobs"
            raise error(
                f"`stfuse.Engine.{call}`: found job '{name}'; the engine has {names}.",
                jobs=(str(name),),
            )
        return tenant

    def _check_thread(self, call: str) -> None:
        if self._server.on_own_thread():
            raise RuntimeError(
                f"`stfuse.Engine.{call}`: found a call from a future's callback, which "
                f"runs on a thread of the engine and would hold up, or wait for, "
                f"itself; call it from another thread."
            )

    def _too_late(
        self, name: str, timeout_s: float | None, future: Future[Any], error: Any
    ) -> DeadlineError:
        future.cancel()
        if isinstance(error, DeadlineError):
            return error
        return DeadlineError(
            f"`stfuse.Engine.infer`: job '{name}': no answer within {timeout_s} s.",
            jobs=(name,),
        )


def _started(server: Server, builder: Builder) -> list[threading.Thread]:
    """Start an engine's threads: two build, one serves, two run callbacks."""
    threads = [
        threading.Thread(target=run, name=f"stfuse-{what}", daemon=True)
        for what, run in (
            ("build", lambda: _supervise.build(server, builder)),
            ("place", lambda: _supervise.place(server, builder)),
            ("serve", server.turns.held()(server.serve)),
            ("callbacks", server.books.callbacks.run),
            ("awaited", server.books.callbacks.run_awaited),
        )
    ]
    for thread in threads:
        thread.start()
    return threads
