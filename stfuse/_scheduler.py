"""Events in, Decision out. No clock, no thread, no array, no JAX.

Rules:
    Times are passed in, in seconds of one clock; nothing is started after its deadline.
    A tenant's own requests run earliest deadline first, those without one in order.
    Between tenants, under each policy:
        space-time  earliest deadline first; then, among those without deadlines, least
                    weighted service so far, counted in predicted device seconds.
        exclusive   the same order, but a step serves one tenant.
        time        round robin, one request a step.
    Every fourth step starts with a tenant without deadlines, if one waits: a stream of
    deadlines cannot starve it. A tenant that comes back from idle starts level with
    the least served: idling earns no credit.
    A step takes the ready bucket that serves most rows per predicted second among
    those that serve the first tenant in order.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stfuse._errors import ClosedError, DeadlineError, QueueFullError
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


@dataclass(slots=True)
class _Tenant:
    name: str
    weight: float
    lane: str | None = None
    species: tuple[int, ...] = (0,)  # by length
    is_leaving: bool = False
    # (deadline or inf, request, rows, arrival, length), in the order they run.
    queue: list[tuple[float, int, int, float, int]] = field(default_factory=list)
    service_s: float = 0.0
    turn: int = 0


@dataclass(slots=True)
class _Lane:
    capacities: tuple[int, ...]
    ready: dict[Bucket, float] = field(default_factory=dict)


class Scheduler:
    """Decides which requests run in the next step.

    Args:
        policy: who shares a step.
        max_batch_size: most rows of one slot, hence of one request.
        max_queue_size: most requests that one tenant may have waiting.
        max_queue_delay_s: how long a request may wait for company while the device is
            idle and its deadline allows.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch_size: int = 8,
        max_queue_size: int = 1024,
        max_queue_delay_s: float = 0.0,
    ) -> None:
        """Start with no tenants."""
        self._policy = policy
        self._max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._max_queue_delay_s = max_queue_delay_s
        self._tenants: dict[str, _Tenant] = {}
        self._lanes: dict[str, _Lane] = {}
        self._owner: dict[int, _Tenant] = {}
        self._waiting: dict[str, _Tenant] = {}
        self._num_steps = 0

    @property
    def num_queued(self) -> int:
        """Number of requests waiting."""
        return len(self._owner)

    def queued(self, tenant: str) -> tuple[int, ...]:
        """Return a tenant's waiting requests, in the order they would run."""
        known = self._tenants.get(tenant)
        return tuple(entry[1] for entry in known.queue) if known else ()

    def handle(self, event: Event) -> None:
        """Take note of an event.

        Raises:
            QueueFullError: a `Submit` beyond the tenant's bound.
            DeadlineError: a `Submit` whose deadline has passed.
            ClosedError: a `Submit` for a tenant that is unknown or leaving.
        """
        match event:
            case Submit():
                self._submit(event)
            case Cancel():
                self._cancel(event.request)
            case Ready():
                lane = self._lanes.get(event.lane)
                if lane is not None:
                    lane.ready[event.bucket] = event.step_s
            case Install():
                self._install(event)
            case Drain():
                self._max_queue_delay_s = 0.0
            case Join():
                self._tenants[event.tenant] = _Tenant(event.tenant, event.weight)
            case Leave():
                self._leave(event.tenant)

    def decide(self, now_s: float) -> Decision:
        """Choose the next step; what it takes is no longer queued."""
        expired = self._expire(now_s)
        order = self._order()
        for first in order:
            lane = self._lanes.get(first.lane or "")
            if lane is None:
                continue
            # Under the other policies a lane has one tenant.
            is_shared = self._policy is Policy.SPACE_TIME
            mates = [t for t in order if t.lane == first.lane] if is_shared else [first]
            best = self._best(lane, first, mates)
            if best is None:
                continue
            bucket, chunks = best
            step_s = lane.ready[bucket]
            num_taken = sum(len(chunk.requests) for chunk in chunks)
            if num_taken == sum(len(t.queue) for t in mates):  # more may still come
                hold_s = self._hold_until_s(mates, step_s)
                if now_s < hold_s:
                    return Decision(None, expired, hold_s)
            self._take(chunks, step_s)
            batch = Batch(first.lane or "", bucket, tuple(chunks), step_s)
            return Decision(batch, expired)
        return Decision(None, expired, self._next_deadline_s())

    def _submit(self, event: Submit) -> None:
        tenant = self._tenants.get(event.tenant)
        if tenant is None or tenant.is_leaving:
            raise ClosedError(
                f"`stfuse.Engine.submit`: job '{event.tenant}' takes no requests; "
                f"it was removed, or the engine is closed.",
                jobs=(event.tenant,),
            )
        if event.deadline_s is not None and event.deadline_s <= event.now_s:
            raise DeadlineError(
                f"`stfuse.Engine.submit`: job '{event.tenant}': found a deadline that "
                f"has passed; pass deadline_s > 0.",
                jobs=(event.tenant,),
            )
        if len(tenant.queue) >= self._max_queue_size:
            raise QueueFullError(
                f"`stfuse.Engine.submit`: job '{event.tenant}' has "
                f"{len(tenant.queue)} requests waiting, its max_queue_size; submit "
                f"again after some were answered.",
                jobs=(event.tenant,),
            )
        if not tenant.queue:
            active = [t.service_s for t in self._waiting.values()]
            tenant.service_s = max(tenant.service_s, min(active, default=0.0))
            self._waiting[tenant.name] = tenant
        deadline_s = math.inf if event.deadline_s is None else event.deadline_s
        entry = (
            deadline_s,
            event.request,
            event.rows,
            event.now_s,
            event.length,
        )
        bisect.insort(tenant.queue, entry)
        self._owner[event.request] = tenant

    def _cancel(self, request: int) -> None:
        tenant = self._owner.get(request)
        if tenant is not None:
            self._drop(tenant, [request])

    def _install(self, event: Install) -> None:
        if not event.keeps_ready:
            self._lanes[event.lane] = _Lane(event.capacities)
        if not event.members:
            del self._lanes[event.lane]
        for tenant in self._tenants.values():
            if tenant.name in event.members:
                tenant.lane = event.lane
                tenant.species = event.members[tenant.name]
            elif tenant.lane == event.lane:
                tenant.lane = None

    def _leave(self, name: str) -> None:
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.is_leaving = True
            if not tenant.queue:
                del self._tenants[name]

    def _drop(self, tenant: _Tenant, requests: Iterable[int]) -> None:
        """Remove requests from a tenant's queue, and the tenant if it was leaving."""
        gone = set(requests)
        if all(entry[1] in gone for entry in tenant.queue[: len(gone)]):
            del tenant.queue[: len(gone)]
        else:
            tenant.queue = [e for e in tenant.queue if e[1] not in gone]
        for request in gone:
            self._owner.pop(request, None)
        if not tenant.queue:
            self._waiting.pop(tenant.name, None)
            if tenant.is_leaving:
                self._tenants.pop(tenant.name, None)

    def _expire(self, now_s: float) -> tuple[int, ...]:
        expired: list[int] = []
        for tenant in list(self._waiting.values()):
            if tenant.queue[0][0] <= now_s:
                late = [e[1] for e in tenant.queue if e[0] <= now_s]
                expired += late
                self._drop(tenant, late)
        return tuple(expired)

    def _next_deadline_s(self) -> float | None:
        first_s = min((t.queue[0][0] for t in self._waiting.values()), default=math.inf)
        return None if math.isinf(first_s) else first_s

    def _order(self) -> list[_Tenant]:
        """Return waiting tenants, first to be served first."""
        waiting = self._waiting.values()
        if self._policy is Policy.TIME:
            return sorted(waiting, key=lambda t: t.turn)

        def urgency(tenant: _Tenant) -> tuple[float, float, int]:
            deadline_s, request, *_ = tenant.queue[0]
            return (deadline_s, tenant.service_s, request)

        order = sorted(waiting, key=urgency)
        if self._num_steps % _BEST_EFFORT_EVERY == _BEST_EFFORT_EVERY - 1:
            patient = [t for t in order if math.isinf(t.queue[0][0])]
            order = patient[:1] + [t for t in order if t not in patient[:1]]
        return order

    def _chunks(self, tenant: _Tenant, max_rows: int, limit: int) -> list[Chunk]:
        """Cut the front of a queue into slots; stop at a request that fits none."""
        is_one = self._policy is Policy.TIME
        found: list[tuple[list[int], int, int]] = []  # requests, rows, length
        place: dict[int, int] = {}  # where each length's last chunk stands
        for _, request, size, _, length in tenant.queue:
            if size > max_rows:
                break
            at = place.get(length)
            if at is not None and found[at][1] + size <= max_rows and not is_one:
                requests, rows, _ = found[at]
                requests.append(request)
                found[at] = (requests, rows + size, length)
                continue
            if len(found) == (1 if is_one else limit):
                break
            place[length] = len(found)
            found.append(([request], size, length))
        return [
            Chunk(tenant.name, tuple(requests), rows, length, tenant.species[length])
            for requests, rows, length in found
        ]

    def _best(
        self, lane: _Lane, first: _Tenant, mates: Sequence[_Tenant]
    ) -> tuple[Bucket, list[Chunk]] | None:
        """Return the bucket of most rows a second that serves the first tenant."""
        most_slots = max((sum(b.slots) for b in lane.ready), default=0)
        cut: dict[int, list[list[Chunk]]] = {}
        best: tuple[Bucket, list[Chunk]] | None = None
        best_score = 0.0
        for bucket, step_s in lane.ready.items():
            if bucket.rows not in cut:
                cut[bucket.rows] = [
                    self._chunks(t, bucket.rows, most_slots) for t in mates
                ]
            chunks = _fill(lane, bucket, cut[bucket.rows])
            score = sum([chunk.rows for chunk in chunks]) / step_s
            serves_first = chunks and chunks[0].tenant == first.name
            if serves_first and score > best_score:
                best, best_score = (bucket, chunks), score
        return best

    def _hold_until_s(self, mates: Sequence[_Tenant], step_s: float) -> float:
        """Return until when a batch may wait for company."""
        return min(
            min(arrival_s + self._max_queue_delay_s, deadline_s - step_s)
            for tenant in mates
            for deadline_s, _, _, arrival_s, _ in tenant.queue
        )

    def _take(self, chunks: Sequence[Chunk], step_s: float) -> None:
        """Remove chunks from the queues, and charge their tenants."""
        total_rows = sum(chunk.rows for chunk in chunks)
        self._num_steps += 1
        for chunk in chunks:
            tenant = self._tenants[chunk.tenant]
            tenant.turn = self._num_steps
            tenant.service_s += step_s * chunk.rows / total_rows / tenant.weight
            self._drop(tenant, chunk.requests)


def _fill(
    lane: _Lane, bucket: Bucket, chunks: Sequence[Sequence[Chunk]]
) -> list[Chunk]:
    """Return what a bucket would serve: a slot for each tenant, then seconds.

    Where all slots of a bank run, a tenant has its own one only.
    """
    left = list(bucket.slots)
    picked: list[Chunk] = []
    held: set[tuple[str, int]] = set()

    def pick(chunk: Chunk) -> None:
        s, who = chunk.species, (chunk.tenant, chunk.species)
        is_dense = bucket.slots[s] == lane.capacities[s]
        if left[s] and not (is_dense and who in held):
            picked.append(chunk)
            held.add(who)
            left[s] -= 1

    for own in chunks:
        if own:
            pick(own[0])
    if any(left):
        for own in chunks:
            for chunk in own[1:]:
                pick(chunk)
    return picked
