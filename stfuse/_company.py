"""Whether a step waits for company. No clock, no thread, no array, no JAX.

It does while every request that it takes may wait, and while it would leave nobody
waiting. Those who ask for more than is left of their share do not count, as long as
they lose nothing of it and no deadline of theirs has a claim: there is always more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from stfuse._buckets import BEYOND
from stfuse._queues import Tenant
from stfuse._types import Bucket, Chunk, Submit


class Company:
    """What the step decided on last waits for, if it does.

    Args:
        delay_s: how long a request may wait; 0 for no company at all.
    """

    def __init__(self, delay_s: float) -> None:
        """Wait for nobody."""
        self.delay_s = delay_s
        self.forget()

    def forget(self) -> None:
        """Wait for nobody."""
        self._lane: str | None = None
        self._served: Collection[str] = ()
        self._patient: Collection[str] = ()
        self._claims: Mapping[str, int] = {}
        self._enough = self._full = self._rows = 0
        self._until_s = math.inf

    def wait(
        self,
        mates: Sequence[Tenant],
        chunks: Sequence[Chunk],
        patient: Collection[str],
        num_queued: int,
        p99_s: float,
        now_s: float,
    ) -> float:
        """Return until when a step may wait.

        Args:
            mates: who may be in it.
            chunks: what it would take.
            patient: who does not count.
            num_queued: requests that wait, everybody's who is not parked.
            p99_s: what such steps take at most.
            now_s: the time.
        """
        taken: dict[str, int] = {}
        for chunk in chunks:
            taken[chunk.tenant] = taken.get(chunk.tenant, 0) + len(chunk.requests)
        num, ends_s, arrived_s = 0, [], []
        for tenant in mates:
            queue, own = tenant.queue, taken.get(tenant.name, 0)
            num += len(queue)
            if own and tenant.is_leaving:  # somebody waits for it to be gone
                return now_s
            if own:  # the first of them is the most urgent
                ends_s.append(queue[0].deadline_s - p99_s)
            if tenant.name not in patient:
                if own < len(queue):
                    return now_s
                arrived_s += [entry.arrival_s for entry in queue]
        # A clock that went back does not say how long they waited.
        if num < num_queued or not arrived_s or max(arrived_s) > now_s:
            return now_s
        return min(*ends_s, min(arrived_s) + self.delay_s)

    def expect(
        self,
        lane: str | None,
        step: tuple[Bucket, Sequence[Chunk]],
        patient: Collection[str],
        claims: Mapping[str, int],
        enough: tuple[int, int],
        until_s: float,
    ) -> None:
        """Take note of what ends a wait before its time.

        Args:
            lane: whose step waits; others' requests are not in it.
            step: that step as it would be now.
            patient: who does not count.
            claims: to slots, of each; empty if all count.
            enough: requests that wait when it does not go on: as many as fill the
                largest step; more than so many, the last somebody's second one.
            until_s: a request with a deadline before that ends it too.
        """
        bucket, chunks = step
        self._lane, self._patient, self._until_s = lane, patient, until_s
        self._served = frozenset([chunk.tenant for chunk in chunks])
        (self._enough, self._full), self._rows = enough, bucket.rows
        self._claims = claims

    def is_there(self, tenant: Tenant, event: Submit, num_queued: int) -> bool:
        """Return whether a request that just came ends the wait.

        Args:
            tenant: whose it is.
            event: the request.
            num_queued: requests that wait now, of those who are not parked.
        """
        deadline_s = event.deadline_s
        if deadline_s is not None and deadline_s < self._until_s:
            return True
        if tenant.is_parked:  # nothing that is ready could serve it
            return False
        if tenant.lane != self._lane or num_queued >= self._enough:
            return True
        is_second = tenant.name in self._served or len(tenant.queue) > 1
        if not is_second or tenant.name in self._patient:
            return False
        if num_queued > self._full or event.rows > self._rows:
            return True
        if not self._claims:
            return False
        return len(tenant.queue) > self._claims.get(tenant.name, 0) + BEYOND
