"""Tenants, what they have waiting, and how many wait for the same lane's steps.

No clock, no thread, no array, no JAX.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from stfuse._types import Policy


class Entry(NamedTuple):
    """A queued request; a queue is sorted by these.

    Attributes:
        deadline_s: when it must have started; infinite for whenever.
        request: its number.
        rows: how many it has.
        arrival_s: when it came.
        length: which of its tenant's programs it is for.
        num_bytes: of its inputs.
    """

    deadline_s: float
    request: int
    rows: int
    arrival_s: float
    length: int = 0
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class Tenant:
    """A tenant and what it has waiting.

    Attributes:
        name: its name.
        weight: of its share.
        lane: who serves it; None while nobody does.
        species: by length, its program's place in the lane.
        is_leaving: whether it takes no more requests.
        queue: its requests, first to run first.
        rows: of all of them.
        num_bytes: of all of them.
        service_s: device seconds it got so far, over its weight.
        level_s: what most had when it began to wait, or was served last.
        since: after how many steps that was.
        began_s: what it had when it last began to wait and others had as much.
        turn: the step that served it last.
        is_parked: whether nothing that is ready could serve it.
        stamp: of its newest entry in a heap; 0 if it has none.
        size: of what it has waiting, as its line counts it; 0 while it is in none.
    """

    name: str
    weight: float
    lane: str | None = None
    species: tuple[int, ...] = (0,)
    is_leaving: bool = False
    queue: list[Entry] = field(default_factory=list)
    rows: int = 0
    num_bytes: int = 0
    service_s: float = 0.0
    level_s: float = 0.0
    since: int = 0
    began_s: float = 0.0
    turn: int = 0
    is_parked: bool = False
    stamp: int = 0
    size: int = 0

    @property
    def head_s(self) -> float:
        """Deadline of its first request; infinite if that, or itself, is none."""
        return self.queue[0].deadline_s if self.queue else math.inf


@dataclass(slots=True)
class _Line:
    """Who waits for steps of one lane.

    Attributes:
        num: tenants.
        heads: finite deadlines of their first requests, sorted.
        sizes: how many tenants have so much waiting, by that.
    """

    num: int = 0
    heads: list[float] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)


class Lines:
    """How many tenants wait for each lane, for how much, and by which deadlines.

    A tenant's deadline is that of its first request.

    Args:
        policy: only ``SPACE_TIME`` has lanes; else all wait in one line. ``TIME``
            counts requests, the others rows.
    """

    def __init__(self, policy: Policy) -> None:
        """Start with nobody."""
        self.has_lanes = policy is Policy.SPACE_TIME
        self._has_one_each = policy is Policy.TIME
        self._lines: dict[str | None, _Line] = {}

    def enter(self, tenant: Tenant) -> None:
        """Have one more tenant wait."""
        lane = tenant.lane if self.has_lanes else None
        line = self._lines.get(lane)
        if line is None:
            line = self._lines[lane] = _Line()
        line.num += 1
        tenant.size = size = len(tenant.queue) if self._has_one_each else tenant.rows
        line.sizes[size] = line.sizes.get(size, 0) + 1
        if (head_s := tenant.head_s) < math.inf:
            bisect.insort(line.heads, head_s)

    def leave(self, tenant: Tenant) -> None:
        """Have one tenant less."""
        lane = tenant.lane if self.has_lanes else None
        line, size, tenant.size = self._lines[lane], tenant.size, 0
        line.num -= 1
        if not line.num:
            del self._lines[lane]
            return
        _less(line.sizes, size)
        if (head_s := tenant.head_s) < math.inf:
            del line.heads[bisect.bisect_left(line.heads, head_s)]

    def change(self, tenant: Tenant, before_s: float) -> None:
        """Take note that a tenant in a line had another deadline before."""
        heads = self._lines[tenant.lane if self.has_lanes else None].heads
        if before_s < math.inf:
            del heads[bisect.bisect_left(heads, before_s)]
        if (head_s := tenant.head_s) < math.inf:
            bisect.insort(heads, head_s)

    def resize(self, tenant: Tenant) -> None:
        """Take note that a tenant has more or less waiting, if it is in a line."""
        before = tenant.size
        if before:
            sizes = self._lines[tenant.lane if self.has_lanes else None].sizes
            _less(sizes, before)
            after = len(tenant.queue) if self._has_one_each else tenant.rows
            sizes[after] = sizes.get(after, 0) + 1
            tenant.size = after

    def num(self, tenant: Tenant) -> int:
        """Return how many wait in a tenant's line, itself too."""
        line = self._lines.get(tenant.lane if self.has_lanes else None)
        return line.num if line else 0

    def num_beside(self, tenant: Tenant) -> int:
        """Return how many others wait in a tenant's line."""
        return self.num(tenant) - (tenant.size > 0)

    def num_before(self, tenant: Tenant, deadline_s: float, now_s: float) -> int:
        """Return how many of those have an earlier deadline, and not one that is past.

        Args:
            tenant: it does not count itself.
            deadline_s: of a request of it.
            now_s: nobody starts sooner.
        """
        line = self._lines.get(tenant.lane if self.has_lanes else None)
        if line is None:
            return 0
        num = bisect.bisect_left(line.heads, deadline_s)
        num -= bisect.bisect_right(line.heads, now_s, 0, num)
        return num - (tenant.size > 0 and now_s < tenant.head_s < deadline_s)

    def num_in_time(
        self,
        tenant: Tenant,
        deadline_s: float,
        now_s: float,
        slots: int,
        step_s: float,
    ) -> int:
        """Return how many of those can start in time, if no others come before them.

        No more are counted than make the request late.

        Args:
            tenant: as for `num_before`.
            deadline_s: likewise.
            now_s: likewise.
            slots: that start at once.
            step_s: until the next ones do.
        """
        line = self._lines.get(tenant.lane if self.has_lanes else None)
        heads, num, steps, start_s = line.heads if line else [], 0, 0, now_s
        at = bisect.bisect_right(heads, now_s)
        last = bisect.bisect_left(heads, deadline_s)
        while at < last and start_s <= deadline_s:
            some = min(slots, last - at)
            num, at, steps = num + some, at + some, steps + 1
            start_s = now_s + steps * step_s
            at = max(at, bisect.bisect_left(heads, start_s))
        return num - (
            num > 0 and tenant.size > 0 and now_s < tenant.head_s < deadline_s
        )

    def sizes_beside(self, tenant: Tenant) -> dict[int, int]:
        """Return how many of those wait for so much, by that."""
        line = self._lines.get(tenant.lane if self.has_lanes else None)
        sizes = dict(line.sizes) if line else {}
        if tenant.size:
            _less(sizes, tenant.size)
        return sizes


def _less(sizes: dict[int, int], size: int) -> None:
    """Have one tenant less that waits for so much."""
    if sizes[size] == 1:
        del sizes[size]
    else:
        sizes[size] -= 1
