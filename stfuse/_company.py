"""Whether a step waits for company. No clock, no thread, no array, no JAX.

It does while every request that it takes may wait, and while it would leave nobody
waiting; those who are beyond their share do not count: there is always more of theirs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

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
        self._enough, self._until_s = 0, math.inf

    def forget(self) -> None:
        """Wait for nobody."""
        self._enough, self._until_s = 0, math.inf

    def wait(
        self,
        mates: Sequence[Tenant],
        chunks: Sequence[Chunk],
        claims: Mapping[str, int] | None,
        num_queued: int,
        p99_s: float,
        now_s: float,
    ) -> float:
        """Return until when a step may wait.

        Args:
            mates: who may be in it.
            chunks: what it would take.
            claims: slots that each of them is entitled to; None if to any.
            num_queued: requests that wait, everybody's.
            p99_s: what such steps take at most.
            now_s: the time.
        """
        served = _served_alone(mates, chunks, claims, num_queued)
        entries = [entry for tenant in served for entry in tenant.queue]
        if any(entry.arrival_s > now_s for entry in entries):
            return now_s  # the clock went back: how long they waited is not known
        ends_s = [
            min(entry.arrival_s + self.delay_s, entry.deadline_s - p99_s)
            for entry in entries
        ]
        return min(ends_s, default=now_s)

    def expect(self, enough: int, until_s: float) -> None:
        """Take note of what ends a wait before its time.

        Args:
            enough: requests that fill the step if so many wait.
            until_s: a request with a deadline before that ends it too.
        """
        self._enough, self._until_s = enough, until_s

    def is_there(self, num_queued: int, deadline_s: float | None) -> bool:
        """Return whether a request that just came ends the wait.

        Args:
            num_queued: requests that wait now.
            deadline_s: the new one's.
        """
        is_urgent = deadline_s is not None and deadline_s < self._until_s
        return is_urgent or num_queued >= self._enough


def _served_alone(
    mates: Sequence[Tenant],
    chunks: Sequence[Chunk],
    claims: Mapping[str, int] | None,
    num_queued: int,
) -> list[Tenant]:
    """Return whom a step serves wholly; nobody if it leaves others waiting."""
    slots = Counter([chunk.tenant for chunk in chunks])
    taken = dict.fromkeys(slots, 0)
    for chunk in chunks:
        taken[chunk.tenant] += len(chunk.requests)
    served, num = [], 0
    for tenant in mates:
        name, own = tenant.name, taken.get(tenant.name, 0)
        if own == len(tenant.queue):
            served.append(tenant)
        elif claims is None or slots[name] < claims[name]:
            return []
        num += len(tenant.queue)
    return served if num == num_queued else []
