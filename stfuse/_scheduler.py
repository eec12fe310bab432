"""Events in, Decision out. No clock, no thread, no array, no JAX.

Rules:
    Times are passed in, in seconds of one clock; nothing is started after its deadline.
    A tenant's own requests run earliest deadline first, those without one in order.
    Between tenants, under each policy:
        space-time  earliest deadline first; then, among those without deadlines and
                    those who had more than their share, least weighted service so far,
                    counted in predicted device seconds; in the order in which they came
                    or were served last where that is about the same.
        exclusive   the same order, but a step serves one tenant.
        time        round robin, one request a step.
    Every fourth step starts with a tenant without deadlines, if one waits: a stream of
    deadlines cannot starve it. A tenant that comes back from idle starts level with
    most who were served last: idling earns no credit.
    A step takes the ready bucket that serves most rows per predicted second among those
    that serve the first tenant in order. So work is fused where the measured times say
    that it pays, and nowhere else. Of unlike weights each counts with as many slots as
    it is due. Where shares are strict, rows of tenants that are beyond theirs do not
    count: each has two of the slots left free at most, and alone short steps only.
    While a step leaves work waiting, throughput decides alone, and requests are dropped
    that a step as long as the last ones would answer after their deadline: they would
    only make the next ones late. Else a bucket that answers the first request in time
    comes before one that does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

from stfuse._admission import Admission, Bounds
from stfuse._buckets import BEYOND, LaneBuckets, Times, best, dues
from stfuse._company import Company
from stfuse._queues import Queues, Tenant
from stfuse._shares import Shares
from stfuse._types import (
    Batch,
    Bucket,
    Cancel,
    Chunk,
    Decision,
    Drain,
    Event,
    Install,
    Join,
    Leave,
    Policy,
    Ready,
    Submit,
)

_BEST_EFFORT_EVERY = 4
_LOOK_AHEAD = 2  # times the slots of a step: tenants that are looked at for it


class Scheduler:
    """Decides which requests run in the next step.

    Args:
        policy: who shares a step.
        max_batch_size: most rows of one slot, hence of one request.
        max_queue_size: most requests that one tenant may have waiting.
        max_queue_delay_s: how long a request may wait for company while its deadline
            allows and its step would leave nobody waiting.
        bounds: all that may wait; None for ``max_queue_size`` alone.
        strict_shares: whether tenants that are beyond their share have no say in which
            bucket runs.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch_size: int = 8,
        max_queue_size: int = 1024,
        max_queue_delay_s: float = 0.0,
        bounds: Bounds | None = None,
        strict_shares: bool = False,
    ) -> None:
        """Start with no tenants."""
        self._policy = policy
        self._max_batch_size = max_batch_size
        # Under TIME nobody shares a step: company would never come.
        self._company = Company(0.0 if policy is Policy.TIME else max_queue_delay_s)
        self._shares = Shares() if strict_shares else None
        self._held: set[str] = set()  # tenants that may not start yet, come what may
        self._claims: dict[str, int] = {}  # to slots, of those looked at last
        self._admission = Admission(policy, bounds or Bounds(max_queue_size))
        self._queues = Queues(policy, self._emptied)
        self._tenants: dict[str, Tenant] = {}
        self._lanes: dict[str, LaneBuckets] = {}
        self._is_contended = False
        self._rest_s: tuple[float, float] | None = None  # decided to wait: from, until

    @property
    def num_queued(self) -> int:
        """Number of requests waiting."""
        return len(self._queues)

    @property
    def queued_rows(self) -> int:
        """Rows of the requests waiting."""
        return self._queues.rows

    @property
    def queued_bytes(self) -> int:
        """Bytes of the inputs of the requests waiting."""
        return self._queues.num_bytes

    @property
    def has_backlog(self) -> bool:
        """Whether as many tenants wait as the last step has slots in use.

        Then one more on the device keeps it busy; else it would be emptier than need
        be, and whoever comes next would wait for both.
        """
        return self._queues.num_tenants >= self._queues.num_slots

    def queued(self, tenant: str) -> tuple[int, ...]:
        """Return a tenant's waiting requests, in the order they would run."""
        known = self._tenants.get(tenant)
        return tuple(entry.request for entry in known.queue) if known else ()

    def handle(self, event: Event) -> None:
        """Take note of an event.

        Raises:
            QueueFullError: a `Submit` beyond a bound.
            DeadlineError: a `Submit` whose deadline has passed, or is sure to pass.
            ClosedError: a `Submit` for a tenant that is unknown or leaving.
        """
        if not isinstance(event, Submit | Ready):
            self._rest_s = None
        match event:
            case Submit():
                self.submit(event)
            case Cancel():
                if tenant := self._queues.owner(event.request):
                    self._queues.drop(tenant, [event.request])
            case Ready():
                self._ready(event)
            case Install():
                self._install(event)
            case Drain():
                self._company.delay_s, self._shares, self._claims = 0.0, None, {}
            case Join():
                self._tenants[event.tenant] = Tenant(event.tenant, event.weight)
                if self._shares:
                    self._shares.join(event.tenant, event.weight)
            case Leave():
                self._leave(event.tenant)

    def submit(self, event: Submit) -> None:
        """Take note of the event that there are most of; as `handle` does."""
        known = self._tenants.get(event.tenant)
        lane = self._lanes.get(known.lane or "") if known else None
        tenant = self._admission.check(event, known, self._queues, self._shares, lane)
        self._queues.add(tenant, event)
        if self._rest_s and self._is_news(tenant, event):
            self._rest_s = None

    @property
    def is_resting(self) -> bool:
        """Whether it was decided to wait, and nothing came since that may end that."""
        return self._rest_s is not None

    def _is_news(self, tenant: Tenant, event: Submit) -> bool:
        """Return whether a request that came may end what was decided last: to wait."""
        if tenant.name in self._held:
            return event.deadline_s is not None
        return self._company.is_there(tenant, event, self._queues.num_ready)

    def decide(self, now_s: float) -> Decision:
        """Choose the next step; what it takes is no longer queued."""
        if self._rest_s and self._rest_s[0] <= now_s < self._rest_s[1]:
            return Decision(None, (), self._rest_s[1])
        decision = self._decide(now_s)
        until_s = decision.wait_until_s
        self._rest_s = None if until_s is None else (now_s, until_s)
        return decision

    def _decide(self, now_s: float) -> Decision:
        expired = self._queues.expired(now_s)
        self._is_contended = self._is_contended and len(self._queues) > 0
        self._company.forget()
        seen: list[Tenant] = []
        order = self._order(seen, now_s, expired)
        decision = None
        held: dict[str | None, float] = {}  # lanes where nobody may start yet
        self._held = set()
        i = 0
        while decision is None and (first := _at(seen, i, order)):
            i += 1
            if first.lane in held:
                continue
            lane = self._lanes.get(first.lane or "")
            found = None
            if lane is not None and lane.ready:
                mates = self._mates(lane, first, i - 1, seen, order)
                if self._shares:
                    self._claims = self._shares.claims(mates, lane, now_s)
                    if not any(self._claims.values()):  # are others further down?
                        mates = self._mates(lane, first, i - 1, seen, order, math.inf)
                        self._claims = self._shares.claims(mates, lane, now_s)
                start_s, found = self._best(lane, mates, now_s)
                if start_s > now_s:
                    held[first.lane] = start_s
                    self._held.update([tenant.name for tenant in mates])
                    continue
            if found is None or lane is None:
                self._queues.park(first)
            else:
                decision = self._decided(lane, mates, found, expired, now_s)
        for tenant in seen:
            if tenant.queue:
                self._queues.place(tenant)
        if decision is None:
            self._is_contended &= not len(self._queues)  # nothing of it may start
            until_s = min([self._queues.next_deadline_s(), *held.values()])
            next_s = None if until_s == math.inf else until_s
            return Decision(None, tuple(expired), next_s)
        return decision

    def _order(
        self, seen: list[Tenant], now_s: float, expired: list[int]
    ) -> Iterator[Tenant]:
        """Take tenants in the order to be served; drop what cannot be in time."""
        turn = self._queues.num_steps % _BEST_EFFORT_EVERY
        is_patient_first = turn == _BEST_EFFORT_EVERY - 1
        for tenant in self._queues.in_order(is_patient_first=is_patient_first):
            if self._is_contended and tenant.queue[0].deadline_s < math.inf:
                lane = self._lanes.get(tenant.lane or "")
                until_s = now_s + self._admission.pace.busy_s(now_s)
                until_s = until_s + lane.step_s if lane else -math.inf
                if hopeless := self._queues.late(tenant, until_s):
                    self._queues.drop(tenant, hopeless)
                    expired += hopeless
            if tenant.queue:
                seen.append(tenant)
                yield tenant

    def _mates(
        self,
        lane: LaneBuckets,
        first: Tenant,
        i: int,
        seen: list[Tenant],
        order: Iterator[Tenant],
        look_ahead: float = _LOOK_AHEAD,
    ) -> list[Tenant]:
        """Return who may share a step with the first tenant, in order."""
        if self._policy is not Policy.SPACE_TIME:  # a lane has one tenant
            return [first]
        most, name = look_ahead * lane.slots, first.lane
        found = [tenant for tenant in seen[i:] if tenant.lane == name]
        while len(found) < most and (tenant := next(order, None)):
            if tenant.lane == name:
                found.append(tenant)
        return found

    def _decided(
        self,
        lane: LaneBuckets,
        mates: Sequence[Tenant],
        found: tuple[Bucket, list[Chunk]],
        expired: Sequence[int],
        now_s: float,
    ) -> Decision:
        """Return a batch, or until when it may wait for company."""
        bucket, chunks = found
        times = lane.ready[bucket]
        # Of a step of one slot, company is more rows in it.
        has_room = lane.slots == 1 and chunks[0].rows < lane.rows
        is_full = len(chunks) >= lane.slots and not has_room
        if self._company.delay_s and not is_full:
            until_s = self._wait_until_s(lane, mates, found, now_s)
            if now_s < until_s:
                self._is_contended = False
                return Decision(None, tuple(expired), until_s)
        self._take(lane, bucket, chunks, now_s)
        self._is_contended = self._queues.are_left(mates, self._claims)
        batch = Batch(mates[0].lane or "", bucket, tuple(chunks), times.step_s)
        return Decision(batch, tuple(expired))

    def _ready(self, event: Ready) -> None:
        if lane := self._lanes.get(event.lane):
            p99_s = event.step_s if event.p99_s is None else event.p99_s
            times = Times(event.step_s, p99_s, max(event.step_s, event.host_s))
            if lane.predict(event.bucket, times):
                self._rest_s = None
                self._queues.unpark(event.lane)
            elif self._rest_s:
                if self._queues.next_deadline_s() < self._rest_s[1] + p99_s:
                    self._rest_s = None  # a step that takes longer begins sooner

    def _install(self, event: Install) -> None:
        old = self._lanes.pop(event.lane, None)
        for name in old.members if old else ():
            tenant = self._tenants.get(name)
            if tenant and tenant.lane == event.lane and name not in event.members:
                self._queues.move(tenant, None)
        self._queues.unpark(event.lane)
        if event.members:
            lane = (event.keeps_ready and old) or LaneBuckets(event.capacities, ())
            lane.members = tuple(event.members)
            self._lanes[event.lane] = lane
        for name, species in event.members.items():
            if tenant := self._tenants.get(name):
                if tenant.lane != event.lane:
                    self._queues.unpark(tenant.lane)
                    self._queues.move(tenant, event.lane)
                tenant.species = species

    def _leave(self, name: str) -> None:
        if tenant := self._tenants.get(name):
            tenant.is_leaving = True
            if not tenant.queue:
                self._emptied(tenant)

    def _emptied(self, tenant: Tenant) -> None:
        """Forget a tenant that was leaving and has nothing left."""
        if tenant.is_leaving:
            del self._tenants[tenant.name]
            if self._shares:
                self._shares.leave(tenant.name)

    def _best(
        self, lane: LaneBuckets, mates: Sequence[Tenant], now_s: float
    ) -> tuple[float, tuple[Bucket, list[Chunk]] | None]:
        """Return from when on what may serve most rows a second, of those that count.

        If that is later, it is not said what.
        """
        rules = {"is_one": self._policy is Policy.TIME, "any_time": self._is_contended}
        of = partial(best, lane, now_s=now_s, **rules)
        claims, shares = self._claims, self._shares
        if not shares:
            claims = dues(lane, mates, self._queues.least_s, self._queues.is_ahead)
        if not claims or all([claims[t.name] >= len(t.queue) for t in mates]):
            return now_s, of(mates)  # all that waits counts
        if shares and len(mates) == 1 and not shares.are_others_about(mates, now_s):
            return now_s, of(mates)
        if shares and not any(claims.values()):
            start_s, longest_s = shares.turn(mates, lane, now_s)
            start_s = min(start_s, shares.next_claim_s(mates, lane, now_s))
            is_later = start_s > now_s  # not if it is less than the clock can tell
            return start_s, None if is_later else of(mates, longest_s=longest_s)
        # Those beyond come after the others, in what these leave free.
        ordered = sorted(mates, key=lambda tenant: not claims[tenant.name])
        spare = BEYOND if shares else lane.slots
        return now_s, of(ordered, claims=claims, spare=spare) or of(mates)

    def _wait_until_s(
        self,
        lane: LaneBuckets,
        mates: Sequence[Tenant],
        found: tuple[Bucket, list[Chunk]],
        now_s: float,
    ) -> float:
        """Return until when a step waits for company, or for what expires meanwhile."""
        (bucket, chunks), num = found, self._queues.num_ready
        patient, end_s = frozenset[str](), math.inf
        if self._shares:
            patient, end_s = self._shares.patient(mates, self._claims, lane, now_s)
        step = mates, chunks, patient, num, lane.ready[bucket].p99_s, now_s
        if (end_s := min(end_s, self._company.wait(*step))) <= now_s:
            return now_s
        until_s = end_s + max([each.p99_s for each in lane.ready.values()])
        room = lane.slots - len(chunks), lane.room(bucket, len(chunks))
        enough = num + room[0], num + room[1]
        step = mates[0].lane, found, patient, self._claims
        self._company.expect(*step, enough, until_s)
        return min(end_s, self._queues.next_deadline_s())

    def _take(
        self, lane: LaneBuckets, bucket: Bucket, chunks: Sequence[Chunk], now_s: float
    ) -> None:
        """Remove chunks from the queues, and charge their tenants."""
        times = lane.ready[bucket]
        row_s = times.cost_s / sum([chunk.rows for chunk in chunks])
        tenants = [self._tenants[chunk.tenant] for chunk in chunks]
        self._queues.charge(tenants, [row_s * chunk.rows for chunk in chunks])
        if self._shares:
            self._shares.spend(chunks, self._claims, lane, bucket, now_s)
        for tenant, chunk in zip(tenants, chunks, strict=True):
            tenant.turn = self._queues.num_steps
            self._queues.drop(tenant, chunk.requests)
        slots = times.cost_s / lane.slot_s(chunks[0].species, bucket.rows)
        self._admission.pace.start(now_s, times.step_s, lane, slots, self._is_contended)


def _at(seen: list[Tenant], i: int, order: Iterator[Tenant]) -> Tenant | None:
    """Return the tenant at a place of an order that is taken only as far as needed."""
    while len(seen) <= i:
        if next(order, None) is None:
            return None
    return seen[i]
