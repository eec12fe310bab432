"""The books: every request from its submission to its one outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stfuse._answers import Answer, Callbacks
from stfuse._errors import StfuseError
from stfuse._flight import Request, Tenant
from stfuse._inputs import Checked
from stfuse._metrics import Metrics
from stfuse._scheduler import Scheduler
from stfuse._types import Batch, Cancel

Ended = tuple[Request, Any]  # a request that is off the books, and its outcome


class Books:
    """Requests without an outcome. Whoever takes one off the books answers it.

    Args:
        lock: guards the books, the scheduler, and who was told what.
        scheduler: knows which of them still wait.
        metrics: counts those that end without an answer.
        depart: called with a tenant that is leaving once its last request ended.
    """

    def __init__(
        self,
        lock: threading.Condition,
        scheduler: Scheduler,
        metrics: Metrics,
        depart: Callable[[Tenant], None],
    ) -> None:
        """Start with no request."""
        self.callbacks = Callbacks()
        self._lock = lock
        self._scheduler = scheduler
        self._metrics = metrics
        self._depart = depart
        self._requests: dict[int, Request] = {}
        self._num_requests = 0

    def next_number(self) -> int:
        """Return a number larger than those before it; the lock is held."""
        self._num_requests += 1
        return self._num_requests

    def open(
        self,
        number: int,
        tenant: Tenant,
        inputs: Checked,
        now_s: float,
        deadline_s: float | None,
    ) -> Answer:
        """Enter a request that the scheduler took; the lock is held."""
        future = Answer(number, self._cancelled)
        self._requests[number] = Request(
            tenant,
            inputs.leaves,
            inputs.rows,
            now_s,
            deadline_s,
            future,
            inputs.length,
            inputs.out_sizes,
        )
        tenant.outstanding += 1
        return future

    def start(self, batch: Batch) -> dict[int, Request]:
        """Tell owners that their requests run; the lock is held.

        Returns:
            Those that were not cancelled, by number.
        """
        found = {}
        for number in [n for chunk in batch.chunks for n in chunk.requests]:
            request = self._requests.get(number)
            if request is None:
                continue
            if not request.is_started:  # a retried one was told already
                request.is_started = True
                if not request.future.set_running_or_notify_cancel():
                    continue  # whoever cancelled it takes it off the books
            found[number] = request
        return found

    def close(self, outcomes: Iterable[tuple[int, Any]]) -> list[Ended]:
        """Take requests off the books, those that still are; the lock is held.

        Returns:
            Those, for `resolve` once the lock is free.
        """
        ended = []
        for number, outcome in outcomes:
            request = self._requests.pop(number, None)
            if request is not None:
                request.tenant.outstanding -= 1
                ended.append((request, outcome))
        return ended

    def resolve(self, ended: Sequence[Ended]) -> None:
        """Give futures their outcomes, without the lock."""
        self.callbacks.resolve([(r.future, outcome) for r, outcome in ended])
        for request, _ in ended:
            tenant = request.tenant
            if tenant.is_leaving and not tenant.outstanding:
                self._depart(tenant)

    def finish(self, outcomes: Sequence[tuple[int, StfuseError]], kind: str) -> None:
        """End requests that got no answer; ``kind`` says how they are counted."""
        with self._lock:
            for number, _ in outcomes:
                if number in self._requests:
                    name = self._requests[number].tenant.job.name
                    self._metrics.count(name, kind)
            ended = self.close(outcomes)
        self.resolve([(r, error.about(r.tenant.job.name)) for r, error in ended])

    def fail_queued(self, error: StfuseError, names: Iterable[str]) -> None:
        """Give the waiting requests of some tenants an error instead of an answer."""
        with self._lock:
            numbers = [n for name in names for n in self._scheduler.queued(name)]
            for number in numbers:
                self._scheduler.handle(Cancel(number))
        self.finish([(number, error) for number in numbers], "failed")

    def fail_all(self, error: StfuseError) -> None:
        """End every request, queued or running, with an error."""
        with self._lock:
            numbers = list(self._requests)
        # First the owners: the scheduler may be what failed.
        self.finish([(number, error) for number in numbers], "failed")
        with self._lock:
            for number in numbers:
                self._scheduler.handle(Cancel(number))

    def _cancelled(self, number: int) -> None:
        with self._lock:
            request = self._requests.get(number)
            if request is None:
                return
            self._scheduler.handle(Cancel(number))
            if not request.is_started:  # else nobody waits for it any more
                request.is_started = True
                request.future.set_running_or_notify_cancel()
            self._metrics.count(request.tenant.job.name, "cancelled")
            ended = self.close([(number, None)])
        self.resolve(ended)
