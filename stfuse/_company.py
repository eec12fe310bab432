"""Whether a step waits for company. No clock, no thread, no array, no JAX.

It does while every request that it takes may wait, and while it would leave nobody
waiting; those who ask for more than their share has left do not count, as long as they
lose nothing of it: there is always more of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from stfuse._queues import Tenant
from stfuse._types import Chunk


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
        self._served: frozenset[str] = frozenset()
        self._enough = self._full = 0
        self._until_s = math.inf

    def wait(
        self,
        mates: Sequence[Tenant],
        chunks: Sequence[Chunk],
        hurried: Collection[str] | None,
        num_queued: int,
        p99_s: float,
        now_s: float,
    ) -> float:
        """Return until when a step may wait.

        Args:
            mates: who may be in it.
            chunks: what it would take.
            hurried: who count; None if all do.
            num_queued: requests that wait, everybody's.
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
            if own:  # the first of them is the most urgent
                ends_s.append(queue[0].deadline_s - p99_s)
            if hurried is None or tenant.name in hurried:
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
        served: frozenset[str],
        num_queued: int,
        room: tuple[int, int],
        until_s: float,
    ) -> None:
        """Take note of what ends a wait before its time.

        Args:
            lane: whose step waits; others' requests are not in it.
            served: who is in it, and counts.
            num_queued: requests that wait now.
            room: slots that are left: whoever asks for them, and if it is somebody
                who is served already.
            until_s: a request with a deadline before that ends it too.
        """
        self._lane, self._served, self._until_s = lane, served, until_s
        self._enough, self._full = (num_queued + slots for slots in room)

    def is_there(
        self, tenant: Tenant, num_queued: int, deadline_s: float | None
    ) -> bool:
        """Return whether a request that just came ends the wait.

        Args:
            tenant: whose it is.
            num_queued: requests that wait now.
            deadline_s: the new one's.
        """
        is_urgent = deadline_s is not None and deadline_s < self._until_s
        is_another = tenant.lane != self._lane
        has_no_place = tenant.name in self._served and num_queued > self._full
        return is_urgent or is_another or has_no_place or num_queued >= self._enough
