"""Who is beyond its share, where shares are strict. No clock, no thread, no JAX.

A tenant's share of the device's time is its weight over that of all tenants. What it
is served goes into a leaky bucket of its own, counted as in a full step; its share runs
out of it. Whoever has more in it than a few slots is beyond its share for now.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stfuse._buckets import BEYOND, LaneBuckets
from stfuse._queues import Tenant
from stfuse._types import Bucket, Chunk

_BURST = 8.0  # slots, where shares are equal: so many at once are nobody's flood
_RECENT_S = 1.0  # others count as here so long after they were served
_SHORT = 1.25  # times the shortest step: what a step may take that serves no other
_REST = 16.0  # times as long as it took until the next one of those
_LATELY = 32  # steps: over so many it is averaged what a tenant got


@dataclass(slots=True)
class _Account:
    """A tenant's leaky bucket.

    Attributes:
        weight: of its share.
        share: of the device's time; at most 1.
        burst: slots that it may have at once.
        most: the same, whole ones.
        spent_s: what was in it, seconds.
        at_s: as of when.
        per_step: slots of a step that it had lately while it was beyond its share.
    """

    weight: float
    share: float = 0.0
    burst: float = 0.0
    most: int = 0
    spent_s: float = 0.0
    at_s: float = 0.0
    per_step: float = BEYOND

    def left_s(self, now_s: float) -> float:
        """Return what is in it; no more than there was, should the clock go back."""
        gone_s = self.share * (now_s - self.at_s)
        return max(self.spent_s - gone_s, 0.0) if gone_s > 0 else self.spent_s


class Shares:
    """The buckets of all tenants."""

    def __init__(self) -> None:
        """Start with no tenants."""
        self._accounts: dict[str, _Account] = {}
        self._is_divided = True
        self._recent: dict[str, float] = {}  # when whoever had a claim was served last
        self._rested_s = -math.inf  # when those beyond may have a step of their own

    def join(self, name: str, weight: float) -> None:
        """Take note of a tenant."""
        self._accounts[name] = _Account(weight)
        self._is_divided = False

    def leave(self, name: str) -> None:
        """Forget one."""
        self._accounts.pop(name, None)
        self._recent.pop(name, None)
        self._is_divided = False

    def claims(
        self, tenants: Iterable[Tenant], lane: LaneBuckets, now_s: float
    ) -> dict[str, int]:
        """Return how many slots of the next step each is entitled to, 0 if beyond.

        Args:
            tenants: of one lane; each waits for a slot.
            lane: theirs.
            now_s: the time.
        """
        if not self._is_divided:
            self._divide()
        found: dict[str, int] = {}
        for tenant in tenants:
            account = self._accounts[tenant.name]
            found[tenant.name] = account.most
            # Most often all that was in it has run out.
            if account.spent_s > account.share * (now_s - account.at_s):
                slots = account.left_s(now_s) / lane.slot_s(*_slot_of(tenant))
                found[tenant.name] = _whole(max(account.burst - slots, 0.0))
        return found

    def next_claim_s(
        self, tenants: Iterable[Tenant], lane: LaneBuckets, now_s: float
    ) -> float:
        """Return when the first of those beyond their share has a claim; or infinity.

        Args:
            tenants: of one lane; each waits for a slot.
            lane: theirs.
            now_s: the time.
        """
        found = math.inf
        for tenant in tenants:
            account = self._accounts[tenant.name]
            kept_s = (account.burst - 1) * lane.slot_s(*_slot_of(tenant))
            over_s = account.left_s(now_s) - kept_s
            if over_s > 0:
                found = min(found, now_s + over_s / account.share)
        return found

    def patient(
        self,
        tenants: Iterable[Tenant],
        claims: Mapping[str, int],
        lane: LaneBuckets,
        now_s: float,
    ) -> tuple[frozenset[str], float]:
        """Return who asks for more than its claim and loses nothing yet by waiting.

        Without deadlines that is so until its claim is as large as it can be, with
        deadlines until it has one.

        Args:
            tenants: of one lane; each waits for a slot.
            claims: to slots, of each.
            lane: theirs.
            now_s: the time.

        Returns:
            Their names, and when the first of them would lose something.
        """
        found, until_s = [], math.inf
        for tenant in tenants:
            claim, account = claims[tenant.name], self._accounts[tenant.name]
            if claim >= min(len(tenant.queue), account.most):
                continue
            if tenant.queue[0].deadline_s == math.inf:
                found.append(tenant.name)
                own_s = account.left_s(now_s) / account.share
                until_s = min(until_s, now_s + own_s)
            elif not claim:
                found.append(tenant.name)
                until_s = min(until_s, self.next_claim_s([tenant], lane, now_s))
        return frozenset(found), until_s

    def are_others_about(self, tenants: Iterable[Tenant], now_s: float) -> bool:
        """Return whether anybody else with a claim was served a moment ago."""
        return self._other_s([tenant.name for tenant in tenants], now_s) > -math.inf

    def _other_s(self, names: Collection[str], now_s: float) -> float:
        """Return when anybody else with a claim was served last, if a moment ago."""
        own = set(names)
        for name, at_s in reversed(self._recent.items()):  # the last one first
            if now_s - at_s >= _RECENT_S:
                break
            if at_s > now_s:  # the clock went back
                at_s = self._recent[name] = now_s
            if name not in own:
                return at_s
        return -math.inf

    def steps_until(
        self, name: str, slots: int, lane: LaneBuckets, now_s: float
    ) -> int:
        """Return about how many steps it takes until a tenant had so many slots.

        0 while nobody else is about: then it is not held back.

        Args:
            name: the tenant's.
            slots: that it waits for; a burst of them counts for nothing, nor do those
                of a step of its own after it was quiet.
            lane: whose steps serve it.
            now_s: the time.
        """
        account = self._accounts[name]
        if not account.burst or slots <= account.burst:
            return 0
        if self._other_s([name], now_s) == -math.inf:
            return 0
        # Not both: what it has beyond its share is charged to it as well.
        gets = max(account.per_step, account.share * lane.full_slots)
        if account.left_s(now_s) <= 0:  # it is no flood yet
            slots -= _short_slots(lane)
        return int(max(slots - account.burst, 0.0) / gets)

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
        others_s = self._other_s([tenant.name for tenant in tenants], now_s)
        if others_s == -math.inf:
            return now_s, math.inf
        shortest_s = lane.shortest_s(*_slot_of(tenants[0]))
        self._rested_s = min(self._rested_s, now_s + _REST * shortest_s)
        start_s = min(self._rested_s, others_s + _RECENT_S)
        return start_s, _SHORT * shortest_s

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
        if not self._is_divided:
            self._divide()
        took_s = {s: lane.slot_s(s, bucket.rows) for s in {c.species for c in chunks}}
        for name, _, _, _, species in chunks:
            account, slot_s = self._accounts[name], took_s[species]
            # No more than two bursts: what it had while nobody else was about is past.
            # But a small step forgives nothing of what larger ones have left.
            left_s, most_s = account.left_s(now_s), 2 * account.burst * slot_s
            account.spent_s = max(left_s, min(left_s + slot_s, most_s))
            account.at_s = now_s
            if claims[name]:
                self._recent.pop(name, None)  # those served last stand last
                self._recent[name] = now_s
        if all(claims.values()):
            return
        had = Counter([chunk.tenant for chunk in chunks])
        for name in [name for name, claim in claims.items() if not claim]:
            account = self._accounts[name]
            account.per_step += (had[name] - account.per_step) / _LATELY
        if not any([claims[chunk.tenant] for chunk in chunks]):
            self._rested_s = now_s + _REST * lane.ready[bucket].step_s

    def _divide(self) -> None:
        """Work out each tenant's share, and its burst."""
        accounts, self._is_divided = self._accounts.values(), True
        whole, num = sum([each.weight for each in accounts]), len(accounts)
        for each in accounts:
            each.share = each.weight / whole
            each.burst = max(_BURST * each.share * num, 1.0)
            each.most = _whole(each.burst)


def _short_slots(lane: LaneBuckets) -> int:
    """Return how many slots a step has at most that serves those beyond alone."""
    most_s = _SHORT * min([times.step_s for times in lane.ready.values()])
    ready = lane.ready.items()
    return max([lane.sizes[each] for each, times in ready if times.step_s <= most_s])


def _whole(slots: float) -> int:
    """Return how many whole ones: what ran out exactly is not a last bit short."""
    return int(slots + 1e-6)


def _slot_of(tenant: Tenant) -> tuple[int, int]:
    """Return the species and rows of what a tenant waits for first."""
    _, _, rows, _, length, _ = tenant.queue[0]
    return tenant.species[length], rows
