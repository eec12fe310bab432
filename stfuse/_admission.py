"""Which requests are taken: exact bounds, and none that is sure to be late.

The estimate of when a request would start is a lower one: a wrong refusal is worse than
a request that expires in its queue.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import islice

from stfuse._buckets import LaneBuckets
from stfuse._errors import ClosedError, DeadlineError, QueueFullError
from stfuse._options import check_sizes
from stfuse._queues import Queues, Tenant
from stfuse._shares import Shares
from stfuse._types import Policy, Submit

_CALL = "`stfuse.Engine.submit`"
_KEPT = 0.8  # of the old average when a step is added to it
_MOST_STEPS = 2  # in flight: what is running cannot take longer
_MOST_GAP = 4.0  # times a step
_LAST = 32  # steps that are looked at for what one takes at least
_WHAT = (  # of what a bound is exceeded, in the order of `Bounds`
    "requests waiting, its max_queue_size",
    "rows waiting, its max_queue_rows",
    "bytes waiting, its max_queue_bytes",
    "rows of all jobs before it, and max_total_rows",
    "bytes of all jobs before it, and max_total_bytes",
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may wait; None for as much as comes.

    Attributes:
        max_queue_size: requests of one tenant.
        max_queue_rows: rows of one tenant.
        max_queue_bytes: bytes of one tenant's inputs.
        max_total_rows: rows of all tenants.
        max_total_bytes: bytes of all tenants' inputs.
    """

    max_queue_size: int = 1024
    max_queue_rows: int | None = None
    max_queue_bytes: int | None = None
    max_total_rows: int | None = None
    max_total_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no bound."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        check_sizes(
            **{
                name: most
                for name, most in given.items()
                if most is not None or name == "max_queue_size"
            }
        )


class Pace:
    """How fast steps have been going, all lanes' together.

    Attributes:
        gap_s: average seconds from one step's start to the next one's.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self._last_s: deque[float] = deque(maxlen=_LAST)
        self.gap_s = self._most_s = self._free_s = 0.0
        self._started_s = -math.inf

    @property
    def least_s(self) -> float:
        """Return what the shortest of the last steps took, seconds; 0 before any."""
        return min(self._last_s, default=0.0)

    def start(
        self,
        now_s: float,
        step_s: float,
        lane: LaneBuckets,
        full_slots: float,
        was_awaited: bool,
    ) -> None:
        """Take note of a step of a lane that is started.

        Args:
            now_s: when.
            step_s: what it is predicted to take.
            lane: whose it is.
            full_slots: slots of a full step that take as long.
            was_awaited: whether the step before left anybody waiting.
        """
        kept = _KEPT if lane.step_s else 0.0
        lane.full_slots = kept * lane.full_slots + (1 - kept) * full_slots
        lane.step_s = kept * lane.step_s + (1 - kept) * step_s
        gap_s = step_s
        if was_awaited:  # what the host takes longer for counts, idling does not
            gap_s = min(max(now_s - self._started_s, 0.0), _MOST_GAP * step_s)
        kept = _KEPT if self.gap_s else 0.0
        self.gap_s, self._started_s = kept * self.gap_s + (1 - kept) * gap_s, now_s
        self._last_s.append(step_s)
        self._most_s = sum(islice(reversed(self._last_s), _MOST_STEPS))
        self._free_s = max(self._free_s, now_s) + step_s

    def busy_s(self, now_s: float) -> float:
        """Return how long the device will be busy with what was started."""
        return min(max(self._free_s - now_s, 0.0), self._most_s)


class Admission:
    """Decides about each request as it arrives.

    Args:
        policy: who shares a step.
        bounds: what may wait.
    """

    def __init__(self, policy: Policy, bounds: Bounds) -> None:
        """Start with an unknown pace."""
        self.pace = Pace()
        self._policy = policy
        most = [getattr(bounds, field.name) for field in fields(bounds)]
        self._most = [math.inf if each is None else each for each in most]

    def check(
        self,
        event: Submit,
        tenant: Tenant | None,
        queues: Queues,
        shares: Shares | None,
        lane: LaneBuckets | None,
    ) -> Tenant:
        """Return whose request it is, if it is taken.

        Args:
            event: the request.
            tenant: whose it is; None if that is unknown.
            queues: what waits.
            shares: where they are strict, who is beyond its own.
            lane: whose steps serve it; None while none does.

        Raises:
            ClosedError: its tenant is unknown or leaving.
            DeadlineError: its deadline has passed, or is sure to pass first.
            QueueFullError: there is no room.
        """
        if tenant is None or tenant.is_leaving:
            raise ClosedError(
                f"{_CALL}: job '{event.tenant}' takes no requests; it was removed, or "
                f"the engine is closed.",
                jobs=(event.tenant,),
            )
        if event.deadline_s is not None and event.deadline_s <= event.now_s:
            raise DeadlineError(
                f"{_CALL}: job '{event.tenant}': found a deadline that has passed; "
                f"pass deadline_s > 0.",
                jobs=(event.tenant,),
            )
        if not self._has_room(event, tenant, queues):
            raise self._full(event, tenant, queues, lane)
        if event.deadline_s is not None:
            wait_s = self._wait_s(event, tenant, queues, shares, lane)
            if event.now_s + wait_s > event.deadline_s:
                raise DeadlineError(
                    f"{_CALL}: job '{event.tenant}': found a deadline in "
                    f"{event.deadline_s - event.now_s:.3g} s, but what waits before "
                    f"this request takes {wait_s:.3g} s; send less, or allow more.",
                    jobs=(event.tenant,),
                )
        return tenant

    def _has_room(self, event: Submit, tenant: Tenant, queues: Queues) -> bool:
        most_requests, most_rows, most_bytes, all_rows, all_bytes = self._most
        return (
            len(tenant.queue) < most_requests
            and tenant.rows + event.rows <= most_rows
            and tenant.num_bytes + event.num_bytes <= most_bytes
            and queues.rows + event.rows <= all_rows
            and queues.num_bytes + event.num_bytes <= all_bytes
        )

    def _full(
        self, event: Submit, tenant: Tenant, queues: Queues, lane: LaneBuckets | None
    ) -> QueueFullError:
        rows, num_bytes = event.rows, event.num_bytes
        own = len(tenant.queue), tenant.rows, tenant.num_bytes
        has = *own, queues.rows, queues.num_bytes
        needs = map(operator.add, has, (1, rows, num_bytes, rows, num_bytes))
        which = [*map(operator.le, needs, self._most)].index(False)
        num = queues.lines.num_beside(tenant) + 1
        after_s = self._room_after_s(event.now_s, num, lane)
        wait = f" in {after_s:.3g} s" if after_s else ""
        return QueueFullError(
            f"{_CALL}: job '{event.tenant}' has {has[which]} {_WHAT[which]} is "
            f"{self._most[which]}; submit again{wait}, after some were answered.",
            jobs=(event.tenant,),
            retry_after_s=after_s,
        )

    def _room_after_s(
        self, now_s: float, num_tenants: int, lane: LaneBuckets | None
    ) -> float | None:
        """Return when a request of one of so many will have left its queue."""
        if lane is None or not lane.step_s:
            return None
        turns = -(-num_tenants // lane.slots)
        return self.pace.busy_s(now_s) + turns * lane.step_s

    def _wait_s(
        self,
        event: Submit,
        tenant: Tenant,
        queues: Queues,
        shares: Shares | None,
        lane: LaneBuckets | None,
    ) -> float:
        """Return for how long a request will at least wait.

        What waits by now counts as served. Only others of its lane do, with what they
        have waiting, and none where shares are strict: who has no claim comes later,
        whatever its deadline.
        """
        pace, now_s, deadline_s = self.pace, event.now_s, event.deadline_s or 0.0
        busy_s, lines = pace.busy_s(now_s), queues.lines
        own, rows = _own_before(tenant, deadline_s, now_s)
        # Of unlike lengths the last one may have room beside earlier ones.
        slots = rows // lane.rows - len(tenant.species) + 1 if lane and lane.rows else 0
        slots = max(slots, 0)
        if self._policy is Policy.TIME:
            turns = _turns_before(own, lines.sizes_beside(tenant)) if own else 0
            return busy_s + turns * pace.least_s
        if self._policy is Policy.EXCLUSIVE:
            start_s, turn_s = now_s + busy_s, pace.least_s
            before = lines.num_before(tenant, deadline_s, start_s)
            if start_s + (slots + before) * turn_s > deadline_s:  # if all of them start
                before = lines.num_in_time(tenant, deadline_s, start_s, 1, turn_s)
            return busy_s + (slots + before) * turn_s
        if lane is None or not lane.step_s:  # what its steps take is not known
            return busy_s
        if shares is None:
            start_s = now_s + busy_s
            return busy_s + _steps_s(slots, deadline_s, start_s, tenant, queues, lane)
        if not slots:  # most often: nothing of its own is in the way
            return busy_s
        steps = shares.steps_until(tenant.name, slots, lane, now_s)
        return busy_s + max(_own_s(slots, tenant.species, lane), steps * pace.gap_s)


def _own_before(tenant: Tenant, deadline_s: float, now_s: float) -> tuple[int, int]:
    """Return how many requests and rows of a tenant run before one with a deadline."""
    queue = tenant.queue
    if not queue or (now_s < tenant.head_s and queue[-1].deadline_s <= deadline_s):
        return len(queue), tenant.rows
    rows = [each.rows for each in queue if now_s < each.deadline_s <= deadline_s]
    return len(rows), sum(rows)


def _turns_before(own: int, sizes: Mapping[int, int]) -> int:
    """Return how many requests come before one if each tenant has one in turn.

    Args:
        own: requests of its tenant before it.
        sizes: how many others have so many waiting, by that.
    """
    return own + sum([min(size, own) * num for size, num in sizes.items()])


def _own_s(own: int, species: tuple[int, ...], lane: LaneBuckets) -> float:
    """Return how long steps take at least that serve so many slots of a tenant."""
    most, most_s = _most_own(species, lane)
    return own // most * min(most_s, lane.step_s)


def _most_own(species: tuple[int, ...], lane: LaneBuckets) -> tuple[int, float]:
    """Return the most slots of a step for one tenant, and what they take at least.

    Whoever else waits. Where a bank runs as a whole, it has its own slot only.
    """
    if found := lane.own.get(species):
        return found
    most, slot_s = 1, math.inf
    for bucket, times in lane.ready.items():
        pairs = [(bucket.slots[each], lane.capacities[each]) for each in species]
        num = sum(
            [1 if k == all_of and not bucket.is_open else k for k, all_of in pairs]
        )
        if num:
            part = bucket.rows / lane.rows  # of a slot
            most, slot_s = max(most, num), min(slot_s, times.step_s / (num * part))
    lane.own[species] = found = most, most * slot_s
    return found


def _steps_s(
    own: int,
    deadline_s: float,
    start_s: float,
    tenant: Tenant,
    queues: Queues,
    lane: LaneBuckets,
) -> float:
    """Return how long the steps of a lane at least take that come before a request's.

    Args:
        own: slots of its tenant before it.
        deadline_s: its own.
        start_s: when what is running now has ended.
        tenant: whose it is.
        queues: what waits.
        lane: whose steps serve it.
    """
    step_s, lines, spare_s = lane.step_s, queues.lines, deadline_s - start_s
    before = lines.num_before(tenant, deadline_s, start_s)
    if (own + before) // lane.slots * step_s > spare_s:  # if all of them start
        before = lines.num_in_time(tenant, deadline_s, start_s, lane.slots, step_s)
    if len(lane.capacities) > 1:  # others' slots may be none that it could have
        before_s = (before // lane.slots - 1) * step_s
        return max(_own_s(own, tenant.species, lane), before_s)
    before_s, most = (own + before) // lane.slots * step_s, max(lane.open_slots, 1)
    gets = max(most - lines.num_beside(tenant), 1)
    if own < gets:  # most often
        return before_s
    if not queues.is_even:  # others may be due no slot for long
        return max(before_s, _own_s(own, tenant.species, lane))
    if most < lane.slots:  # steps in which it has more than others are shorter
        step_s = min(step_s, _most_own(tenant.species, lane)[1])
    if own // gets * step_s <= spare_s:  # in time, however long others stay
        return max(before_s, own // most * step_s)
    sizes = lines.sizes_beside(tenant)
    return max(before_s, _steps_until(own, sizes, lane, spare_s / step_s) * step_s)


def _steps_until(
    own: int, sizes: Mapping[int, int], lane: LaneBuckets, enough: float
) -> int:
    """Return after how many steps at least a tenant had so many slots.

    While others are as many as the slots of which it may have several, it has one of a
    step at most, and so have they. Then they have one of each step for as long as they
    have anything waiting. Who has more of one is done sooner: no more are there in all.

    Args:
        own: slots that it is to have.
        sizes: how many others have so many rows waiting, by that.
        lane: whose steps they wait for.
        enough: steps; how many more than these does not matter.
    """
    most, slots, rows = max(lane.open_slots, 1), lane.slots, lane.rows
    num_others, work, got, steps = sum(sizes.values()), 0, 0, 0
    for size, num in sorted(sizes.items()):
        until, crowd = -(-size // rows), num_others - most + 1
        if crowd > 0:  # so many have to be done first
            work += until * (num if num < crowd else crowd)
            if work > until * slots:
                until = -(-work // slots)
        if until > steps:
            gets = (until - steps) * (1 if crowd > 0 else 1 - crowd)
            if got + gets > own:
                break
            got, steps = got + gets, until
            if steps > enough:
                return steps
        num_others -= num
    return steps + (own - got) // max(most - num_others, 1)
