"""Which requests are taken: exact bounds, and none that is sure to be late.

The estimate of when a request would start is a lower one: a wrong refusal is worse than
a request that expires in its queue.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields

from stfuse._buckets import LaneBuckets
from stfuse._errors import ClosedError, DeadlineError, QueueFullError
from stfuse._options import check_sizes
from stfuse._queues import Queues, Tenant
from stfuse._shares import Shares
from stfuse._types import Policy, Submit

_CALL = "`stfuse.Engine.submit`"
_KEPT = 0.8  # of the old average when a step is added to it
_MOST_STEPS = 2  # in flight: what is running cannot take longer
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
    """How fast steps have been going.

    Attributes:
        step_s: average seconds of the last steps; 0 before the first.
        slots: most slots of a step of the lane that ran last.
        rows: most rows of a slot of it.
        is_dense: whether a tenant has one slot of its largest step, not more.
        full_slots: average slots of a full step that take as long as a step lately.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self.step_s = self.full_slots = 0.0
        self.slots = self.rows = 1
        self.is_dense = True
        self._free_s = 0.0

    def start(
        self, now_s: float, step_s: float, lane: LaneBuckets, full_slots: float
    ) -> None:
        """Take note of a step of a lane that is started."""
        kept = _KEPT if self.step_s else 0.0
        self.full_slots = kept * self.full_slots + (1 - kept) * full_slots
        self.step_s = kept * self.step_s + (1 - kept) * step_s
        self.slots, self.rows, self.is_dense = lane.slots, lane.rows, lane.is_dense
        self._free_s = max(self._free_s, now_s) + step_s

    def busy_s(self, now_s: float) -> float:
        """Return how long the device will be busy with what was started."""
        return min(max(self._free_s - now_s, 0.0), _MOST_STEPS * self.step_s)


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
    ) -> Tenant:
        """Return whose request it is, if it is taken.

        Args:
            event: the request.
            tenant: whose it is; None if that is unknown.
            queues: what waits.
            shares: where they are strict, who is beyond its own.

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
            raise self._full(event, tenant, queues)
        if event.deadline_s is not None and self.pace.step_s:
            wait_s = self._wait_s(event, tenant, queues, shares)
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

    def _full(self, event: Submit, tenant: Tenant, queues: Queues) -> QueueFullError:
        rows, num_bytes = event.rows, event.num_bytes
        own = len(tenant.queue), tenant.rows, tenant.num_bytes
        has = *own, queues.rows, queues.num_bytes
        needs = map(operator.add, has, (1, rows, num_bytes, rows, num_bytes))
        which = [*map(operator.le, needs, self._most)].index(False)
        after_s = self._room_after_s(event, queues)
        wait = f" in {after_s:.3g} s" if after_s else ""
        return QueueFullError(
            f"{_CALL}: job '{event.tenant}' has {has[which]} {_WHAT[which]} is "
            f"{self._most[which]}; submit again{wait}, after some were answered.",
            jobs=(event.tenant,),
            retry_after_s=after_s,
        )

    def _room_after_s(self, event: Submit, queues: Queues) -> float | None:
        """Return when a request of this tenant will have left its queue."""
        if not self.pace.step_s:
            return None
        turns = -(-len(queues.waiting) // self.pace.slots)
        return self.pace.busy_s(event.now_s) + turns * self.pace.step_s

    def _wait_s(
        self, event: Submit, tenant: Tenant, queues: Queues, shares: Shares | None
    ) -> float:
        """Return for how long a request will at least wait.

        Others count with one slot each, whatever they have waiting: that is what a step
        gives them before this tenant has its own.
        """
        pace, num_others = self.pace, len(queues.waiting) - bool(tenant.queue)
        slots = pace.slots if self._policy is Policy.SPACE_TIME else 1
        before = queues.num_before(event.deadline_s or 0.0)
        if not tenant.queue:  # most often: nothing of its own is in the way
            turns = 0 if self._policy is Policy.TIME else before // slots
            return pace.busy_s(event.now_s) + turns * pace.step_s
        own = _own_before(tenant, event.deadline_s)
        if self._policy is Policy.TIME:
            turns = own[0] * (num_others + 1)
        else:
            spare = 1 if pace.is_dense else max(slots - num_others, 1)
            before = max(before - bool(own[0]), 0)
            turns = own[1] // (pace.rows * spare) + before // slots
            if shares is not None:
                name, own_slots = tenant.name, own[1] // pace.rows
                now_s = event.now_s
                steps = shares.steps_until(name, own_slots, pace.full_slots, now_s)
                turns = max(turns, steps)
        return pace.busy_s(event.now_s) + turns * pace.step_s


def _own_before(tenant: Tenant, deadline_s: float | None) -> tuple[int, int]:
    """Return how many requests and rows of a tenant run before one with a deadline."""
    if deadline_s is None or not tenant.queue:
        return len(tenant.queue), tenant.rows
    if tenant.queue[-1].deadline_s <= deadline_s:
        return len(tenant.queue), tenant.rows
    rows = [entry.rows for entry in tenant.queue if entry.deadline_s <= deadline_s]
    return len(rows), sum(rows)
