"""Who is beyond its share, where shares are strict. No clock, no thread, no JAX.

A tenant's share of the device's time is its weight over that of all tenants. What it
is served goes into a leaky bucket of its own, counted as in a full step; its share runs
out of it. Whoever has more in it than a few slots is beyond its share for now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from stfuse._buckets import LaneBuckets
from stfuse._queues import Tenant

_BURST = 8.0  # slots: as many requests at once are nobody's flood
_RECENT_S = 1.0  # others count as here so long after they were served
_SHORT = 1.25  # times the shortest step: what a step may take that serves no other


class Shares:
    """The buckets of all tenants."""

    def __init__(self) -> None:
        """Start with no tenants."""
        self._weights: dict[str, float] = {}
        self._spent: dict[str, tuple[float, float]] = {}  # seconds, and as of when
        self._others_s = -math.inf  # when somebody within its share was served

    def join(self, name: str, weight: float) -> None:
        """Take note of a tenant."""
        self._weights[name] = weight

    def leave(self, name: str) -> None:
        """Forget one."""
        self._weights.pop(name, None)
        self._spent.pop(name, None)

    def beyond(
        self, tenants: Iterable[Tenant], lane: LaneBuckets, rows: int, now_s: float
    ) -> set[str]:
        """Return the names of those that are beyond their shares.

        Args:
            tenants: of one lane.
            lane: theirs.
            rows: of a slot that they need.
            now_s: the time.
        """
        most_s = _BURST * lane.slot_s(rows)
        whole = sum(self._weights.values())
        return {
            tenant.name
            for tenant in tenants
            if tenant.name in self._spent
            and self._left_s(tenant.name, whole, now_s) > most_s
        }

    def longest_s(self, lane: LaneBuckets, rows: int, now_s: float) -> float:
        """Return how long a step may take that serves but those beyond their shares.

        Args:
            lane: theirs.
            rows: of a slot that they need.
            now_s: the time.
        """
        if now_s - self._others_s > _RECENT_S:
            return math.inf
        times = [t.step_s for bucket, t in lane.ready.items() if bucket.rows >= rows]
        return _SHORT * min(times, default=0.0)

    def spend(
        self,
        tenants: Sequence[Tenant],
        beyond: set[str],
        lane: LaneBuckets,
        rows: int,
        now_s: float,
    ) -> None:
        """Take note of a step.

        Args:
            tenants: whom it serves, once per slot.
            beyond: who of them is beyond its share.
            lane: theirs.
            rows: of its slots.
            now_s: the time.
        """
        slot_s, whole = lane.slot_s(rows), sum(self._weights.values())
        for tenant in tenants:
            left_s = self._left_s(tenant.name, whole, now_s)
            self._spent[tenant.name] = left_s + slot_s, now_s
        if any(tenant.name not in beyond for tenant in tenants):
            self._others_s = now_s

    def _left_s(self, name: str, whole: float, now_s: float) -> float:
        spent_s, at_s = self._spent.get(name, (0.0, now_s))
        share = self._weights.get(name, 0.0) / whole
        return max(spent_s - share * max(now_s - at_s, 0.0), 0.0)
