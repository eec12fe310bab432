"""Who belongs in which lane: measures the shared one, evicts, tries again.

The builder asks, and carries it out off the request path; `_stragglers` decides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from absl import logging

from stfuse import _lane
from stfuse._cache import next_power_of_two
from stfuse._flight import Tenant
from stfuse._lane import Lane
from stfuse._members import SHARED
from stfuse._server import Server
from stfuse._stragglers import Backoff, Group, Measured, Watch, measure, worst
from stfuse._types import Bucket, StepRecord

_CHECK_EVERY = 64  # steps of the shared lane


class Regroup:
    """Watches the shared lane.

    Args:
        server: whose lanes.

    Attributes:
        to_measure: a lane and a bucket that `moves` would know the time of.
    """

    def __init__(self, server: Server) -> None:
        """Start with nobody evicted."""
        self._server = server
        self._watch = Watch()
        self._backoff = Backoff()
        self._records: list[StepRecord] = []
        self._own: dict[Hashable, str] = {}  # lanes of evicted programs
        self._trial: Hashable | None = None
        self.to_measure: tuple[Lane, Bucket] | None = None
        self._asked: tuple[int, Bucket] | None = None
        self._num_own = 0

    def observe(self, record: StepRecord) -> None:
        """Keep a step's record; the lock is held."""
        if record.lane == SHARED:
            self._records.append(record)
            if len(self._records) == _CHECK_EVERY:
                self._server.lock.notify_all()

    def is_due(self) -> bool:
        """Return whether `moves` has something to look at; the lock is held."""
        next_s = self._backoff.next_s()
        is_time = not math.isinf(next_s) and next_s <= self._server.clock()
        return is_time or len(self._records) >= _CHECK_EVERY

    def wait_s(self) -> float | None:
        """Return after how long `is_due` may change by itself; None for never."""
        next_s = self._backoff.next_s()
        # A simulated clock wakes us itself whenever it moves.
        if math.isinf(next_s) or not self._server.is_clock_real:
            return None
        return max(next_s - self._server.clock(), 0.0)

    def moves(self) -> list[str]:
        """Decide who moves; return the lanes to be brought up to date, in order."""
        with self._server.lock:
            records, self._records = self._records, []
            tenants = list(self._server.tenants.values())
        for record in records:
            self._watch.add(record)
        moving = {t.home for t in tenants if t.home}
        if moving:
            return list(moving)  # one move at a time
        now_s = self._server.clock()
        return self._try_again(tenants, now_s) or self._evict(tenants, now_s)

    def new_lane(self, name: str) -> str:
        """Return the name of a new lane, which no job's name can be."""
        self._num_own += 1
        return f"{name}#{self._num_own}"

    def is_evicted(self, tenant: Tenant) -> bool:
        """Return whether a job's program has a lane of its own."""
        return program(tenant) in self._own

    def settle(self, tenants: list[Tenant]) -> list[str]:
        """Send new jobs of an evicted program where it is; return those lanes."""
        found = []
        for tenant in tenants:
            own = self._own.get(program(tenant))
            if own in self._server.lanes and not tenant.is_placed:
                tenant.home = own
                found.append(own)
        return found

    def is_trial(self) -> bool:
        """Return whether the shared lane is being built to take a group back."""
        return self._trial is not None

    def give_up(self) -> None:
        """Take note that a lane could not be built; a trial has failed then."""
        key, self._trial = self._trial, None
        if key is not None:
            self._backoff.evict(key, self._server.clock(), self._backoff.use(key))

    def is_refused(self, lane: Lane, tenants: list[Tenant]) -> bool:
        """Return whether a trial failed: a built lane is no better for its evicted.

        They stay where they are then, for twice as long.

        Args:
            lane: holds the evicted group and the others; measured.
            tenants: of that lane.
        """
        key, self._trial = self._trial, None
        back = [t for t in tenants if program(t) == key and t.home == SHARED]
        running = self._server.lanes.get(SHARED)
        if key is None or not back or running is None:
            return False
        first, rest = next(iter(lane.steps)), next(iter(running.steps))
        own = self._server.lanes.get(back[0].lane)
        alone_s = max(own.step_s.values()) if own is not None and own.step_s else 0.0
        others = [t for t in tenants if program(t) != key]
        slos_s = [t.job.slo_s for t in others if t.job.slo_s is not None]
        found = Measured(
            with_s=lane.step_s[first],
            without_s=running.step_s[rest],
            alone_s=alone_s,
            use=self._backoff.use(key),
            share=_weight(back) / _weight(tenants),
            others_slo_s=min(slos_s, default=math.inf),
        )
        reason = found.reason()
        if reason is None:
            self._backoff.returned(key)
            del self._own[key]
            return False
        self._backoff.evict(key, self._server.clock(), found.use)
        for tenant in back:
            tenant.home = None
        logging.info("stfuse: job '%s' stays apart: %s", back[0].job.name, reason)
        return True

    def _try_again(self, tenants: list[Tenant], now_s: float) -> list[str]:
        for key in self._backoff.due(now_s):
            own = self._own.get(key)
            back = [t for t in tenants if t.lane == own and t.is_placed]
            if not back:
                self._backoff.forget(key)
                self._own.pop(key, None)
                continue
            for tenant in back:
                tenant.home = SHARED
            self._trial = key
            return [SHARED]
        return []

    def _evict(self, tenants: list[Tenant], now_s: float) -> list[str]:
        lane = self._server.lanes.get(SHARED)
        of: dict[Hashable, list[Tenant]] = {}
        for tenant in tenants:
            if tenant.lane == SHARED and tenant.is_placed:
                of.setdefault(program(tenant), []).append(tenant)
        if lane is None or len(of) < 2:
            return []
        groups = {key: _group(lane, each) for key, each in of.items()}
        found = measure(SHARED, groups, lane.step_s, self._watch)
        verdict = worst(found)
        if verdict is None:
            return []
        key, reason = verdict
        rest = found[key].rest
        if rest is not None:
            if (id(lane), rest) != self._asked:  # else it cannot be had
                self._asked = (id(lane), rest)
                self.to_measure = (lane, rest)
            return []
        self._backoff.evict(key, now_s, found[key].use)
        name = self._own[key] = self.new_lane(of[key][0].job.name)
        with self._server.lock:
            for tenant in of[key]:
                tenant.home = name
                self._server.metrics.count(tenant.job.name, "evictions")
        self._watch.forget(SHARED)
        names = ", ".join(f"'{t.job.name}'" for t in of[key])
        logging.info("stfuse: %s: evicted to lane '%s': %s", names, name, reason)
        return [name, SHARED]


def program(tenant: Tenant) -> Hashable:
    """Return what jobs of one group have in common."""
    return tuple(trace.key for trace in tenant.member.traces)


def fewer_slots(tenants: Sequence[Tenant], capacity: int | None) -> int | None:
    """Return half the slots, None if pinned jobs or those left need more."""
    of: dict[object, list[bool]] = {}
    for tenant in tenants:
        of.setdefault(program(tenant), []).append(tenant.job.pinned)
    most = capacity or next_power_of_two(max(map(len, of.values())))
    fewer = most // 2
    has_room = all(len(p) <= fewer or sum(p) < fewer for p in of.values())
    return fewer if fewer and has_room else None


def _group(lane: Lane, tenants: list[Tenant]) -> Group:
    slos_s = [t.job.slo_s for t in tenants if t.job.slo_s is not None]
    return Group(
        jobs=frozenset(t.job.name for t in tenants),
        species=_lane.species_of(lane, tenants[0].member),
        weight=_weight(tenants),
        slo_s=min(slos_s, default=math.inf),
    )


def _weight(tenants: list[Tenant]) -> float:
    return sum(t.job.weight for t in tenants)
