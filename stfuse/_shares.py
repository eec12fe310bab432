"""Who is beyond its share, where shares are strict. No clock, no thread, no JAX.

A tenant's share of the device's time is its weight over that of all tenants. What it
is served goes into a leaky bucket of its own, counted as in a full step; its share runs
out of it. Whoever has more in it than a few slots is beyond its share for now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from stfuse._buckets import LaneBuckets
from stfuse._queues import Tenant
from stfuse._types import Bucket, Chunk

_BURST = 8.0  # slots, where shares are equal: so many at once are nobody's flood
_RECENT_S = 1.0  # others count as here so long after they were served
_SHORT = 1.25  # times the shortest step: what a step may take that serves no other
_REST = 8.0  # times as long as it took until the next one of those


class Shares:
    """The buckets of all tenants."""

    def __init__(self) -> None:
        """Start with no tenants."""
        self._weights: dict[str, float] = {}
        self._terms: dict[str, tuple[float, float]] = {}  # share, and slots of a burst
        self._spent: dict[str, tuple[float, float]] = {}  # seconds, and as of when
        self._recent: dict[str, float] = {}  # when whoever had a claim was served last
        self._rested_s = -math.inf  # when those beyond may have a step of their own

    def join(self, name: str, weight: float) -> None:
        """Take note of a tenant."""
        self._weights[name] = weight
        self._terms.clear()

    def leave(self, name: str) -> None:
        """Forget one."""
        self._weights.pop(name, None)
        self._spent.pop(name, None)
        self._recent.pop(name, None)
        self._terms.clear()

    def claims(
        self, tenants: Iterable[Tenant], lane: LaneBuckets, now_s: float
    ) -> dict[str, int]:
        """Return how many slots of the next step each is entitled to, 0 if beyond.

        Args:
            tenants: of one lane; each waits for a slot.
            lane: theirs.
            now_s: the time.
        """
        found: dict[str, int] = {}
        slots_s: dict[tuple[int, int], float] = {}
        for tenant in tenants:
            name, of = tenant.name, _slot_of(tenant)
            if of not in slots_s:
                slots_s[of] = lane.slot_s(*of)
            left = self._left_s(name, now_s) / slots_s[of]
            # Rounded: what ran out exactly is not a last bit short of it.
            found[name] = max(math.floor(self._terms_of(name)[1] - left + 1e-6), 0)
        return found

    def are_others_about(self, tenants: Iterable[Tenant], now_s: float) -> bool:
        """Return whether anybody else with a claim was served a moment ago."""
        since_s = now_s - _RECENT_S
        # No later than now: the clock may have gone back.
        self._recent = {
            name: min(at_s, now_s)
            for name, at_s in self._recent.items()
            if at_s > since_s
        }
        return not self._recent.keys() <= {tenant.name for tenant in tenants}

    def turn(
        self, tenants: Sequence[Tenant], lane: LaneBuckets, now_s: float
    ) -> tuple[float, float]:
        """Return when a step may serve only those beyond their shares, and how long.

        Any, and at once, if nobody else is about. Else a short one now and then: who
        comes meanwhile waits for it, and the host is busy with it.

        Args:
            tenants: they.
            lane: theirs.
            now_s: the time.
        """
        if not self.are_others_about(tenants, now_s):
            return now_s, math.inf
        shortest_s = lane.shortest_s(*_slot_of(tenants[0]))
        self._rested_s = min(self._rested_s, now_s + _REST * shortest_s)
        return self._rested_s, _SHORT * shortest_s

    def spend(
        self,
        chunks: Sequence[Chunk],
        claims: Mapping[str, int],
        lane: LaneBuckets,
        bucket: Bucket,
        now_s: float,
    ) -> None:
        """Take note of a step.

        Args:
            chunks: whom it serves, a slot each.
            claims: of slots that they had.
            lane: theirs.
            bucket: the step's.
            now_s: the time.
        """
        for name, _, _, _, species in chunks:
            slot_s = lane.slot_s(species, bucket.rows)
            # No more than two bursts: what it had while nobody else was about is past.
            most_s = 2 * self._terms_of(name)[1] * slot_s
            left_s = min(self._left_s(name, now_s) + slot_s, most_s)
            self._spent[name] = left_s, now_s
            if claims[name]:
                self._recent[name] = now_s
        if not any(claims[chunk.tenant] for chunk in chunks):
            self._rested_s = now_s + _REST * lane.ready[bucket].step_s

    def _terms_of(self, name: str) -> tuple[float, float]:
        if not self._terms:
            whole, num = sum(self._weights.values()), len(self._weights)
            for each, weight in self._weights.items():
                share = weight / whole
                self._terms[each] = share, max(_BURST * share * num, 1.0)
        return self._terms[name]

    def _left_s(self, name: str, now_s: float) -> float:
        spent_s, at_s = self._spent.get(name, (0.0, now_s))
        return max(spent_s - self._terms_of(name)[0] * max(now_s - at_s, 0.0), 0.0)


def _slot_of(tenant: Tenant) -> tuple[int, int]:
    """Return the species and rows of what a tenant waits for first."""
    _, _, rows, _, length, _ = tenant.queue[0]
    return tenant.species[length], rows
