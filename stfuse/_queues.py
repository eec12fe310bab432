"""Who waits for what, and in which order: tenants' queues. No clock, no array, no JAX.

A tenant that waits stands in a heap. What changes its place adds an entry and leaves
the old one, which is passed over when it comes up: no decision sorts everybody.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stfuse._types import Policy, Submit
from stfuse._waiting import Entry, Lines, Tenant

# Of a step: who had no more than that beyond others is level with them. Less than what
# one tenant alone has of a step, or a flood would come before whoever comes after it.
_LEVEL = 0.5
# Steps: who had more of them than others loses the priority of its deadlines, or a
# flood would never give way. But for its first ones, if others had as much when it
# began to wait: with one step for all, bursts lost deadlines that are met in their
# order (0.6 % at 0.9 of the capacity, 20 tenants, half of them within 20 steps; so it
# is 0.02 %).
_AHEAD, _BURST = 1, 12
_HEAVY = 1.01  # times the mean weight of all who wait
_ROUNDS = 2  # of all who wait: who was passed over for longer comes first


class Queues:
    """All queues, and the order in which tenants are served.

    Args:
        policy: ``TIME`` goes round robin; the others earliest deadline first, then,
            among those without deadlines, in order of arrival, but for those who had
            more service than others: they come last, least service first.
        on_empty: called with a tenant that has nothing left.
    """

    def __init__(self, policy: Policy, on_empty: Callable[[Tenant], None]) -> None:
        """Start with nobody waiting."""
        self._on_empty = on_empty
        self._is_round_robin = policy is Policy.TIME
        self.waiting: dict[str, Tenant] = {}
        self.lines = Lines(policy)  # of those who are not parked
        self._since: dict[str, Tenant] = {}  # not parked, longest passed over first
        self._weight, self._weights = 0.0, list[float]()  # of all of them; sorted
        self.rows = self.num_bytes = 0
        self._owner: dict[int, Tenant] = {}
        self._urgent: list[Any] = []
        self._patient: list[Any] = []
        self._expiring: list[Any] = []
        self._parked: dict[str | None, dict[str, Tenant]] = {}
        self._num_parked = 0  # requests
        self._num_stamps = 0
        self.num_steps = self.num_slots = 0  # so far, and of the last step
        self._step_s = 0.0  # of the last step
        self._virtual_s = 0.0  # what most who were served last had: idling is no credit

    def __len__(self) -> int:
        """Return how many requests wait."""
        return len(self._owner)

    def owner(self, request: int) -> Tenant | None:
        """Return whose a waiting request is."""
        return self._owner.get(request)

    @property
    def num_ready(self) -> int:
        """Return how many requests wait whose tenants are not parked."""
        return len(self._owner) - self._num_parked

    @property
    def num_tenants(self) -> int:
        """Return how many tenants wait and are not parked."""
        return len(self._since)

    @property
    def is_even(self) -> bool:
        """Whether all who wait weigh the same, none parked."""
        return not self._weights or self._weights[0] == self._weights[-1]

    def are_left(self, mates: Sequence[Tenant], claims: Mapping[str, int]) -> bool:
        """Return whether anybody waits who may be served, now that a step is taken.

        Args:
            mates: who could have been in it.
            claims: to slots, of each; empty if all count.
        """
        if not claims or any([t.queue and claims[t.name] for t in mates]):
            return len(self._since) > 0
        num = sum([1 for tenant in mates if tenant.queue])
        if self.lines.has_lanes:  # those further down have no claim either, most likely
            num = self.lines.num(mates[0])
        return len(self._since) > num

    def move(self, tenant: Tenant, lane: str | None) -> None:
        """Have a tenant wait for another lane's steps."""
        if is_waiting := tenant.size > 0:
            self.lines.leave(tenant)
        tenant.lane = lane
        if is_waiting:
            self.lines.enter(tenant)

    def add(self, tenant: Tenant, event: Submit) -> None:
        """Queue a request."""
        request, _, rows, now_s, deadline_s, length, num_bytes = event
        if deadline_s is None:
            deadline_s = math.inf
        entry = Entry(deadline_s, request, rows, now_s, length, num_bytes)
        self._owner[request] = tenant
        queue, before = tenant.queue, tenant.head_s
        self._count(tenant, rows, num_bytes)
        if queue and queue[-1] < entry:
            queue.append(entry)
            self.lines.resize(tenant)
            return
        if not queue:
            if tenant.service_s <= self._virtual_s:
                tenant.service_s = tenant.began_s = self._virtual_s
            tenant.level_s, tenant.since = self._virtual_s, self.num_steps
            self.waiting[tenant.name] = tenant
        bisect.insort(queue, entry)
        if queue[0] is not entry:
            self.lines.resize(tenant)
            return
        self._moved(tenant, before)
        if tenant.is_parked:
            self._unpark(tenant)
            return
        if len(queue) == 1:
            self._await(tenant)
        else:
            self.lines.resize(tenant)
        self.place(tenant)

    def drop(self, tenant: Tenant, requests: Sequence[int]) -> None:
        """Take requests off a queue."""
        queue, before, head = tenant.queue, tenant.head_s, tenant.queue[0]
        first = queue[: len(requests)]
        if len(first) == 1 and first[0].request == requests[0]:
            del queue[0]
        elif [entry.request for entry in first] == [*requests]:  # as good as always
            del queue[: len(first)]
        else:
            gone = set(requests)
            first = [entry for entry in queue if entry.request in gone]
            tenant.queue = [entry for entry in queue if entry.request not in gone]
        for entry in first:
            del self._owner[entry.request]
            self._count(tenant, -entry.rows, -entry.num_bytes)
        self._moved(tenant, before)
        if tenant.queue:
            self.lines.resize(tenant)
            if tenant.is_parked and tenant.queue[0] is not head:
                self._unpark(tenant)
            elif tenant.stamp:  # else whoever took it out of its heap places it again
                self.place(tenant)
        else:
            self.waiting.pop(tenant.name, None)
            self._unawait(tenant)
            tenant.stamp = 0  # its entries are passed over
            if tenant.is_parked:  # it may leave now, or come again and be tried
                tenant.is_parked = False
                for parked in self._parked.values():
                    parked.pop(tenant.name, None)
            self._on_empty(tenant)

    def charge(self, tenants: Sequence[Tenant], costs_s: Sequence[float]) -> None:
        """Add what tenants of one step cost to their service, before they leave it."""
        self._step_s = sum(costs_s)
        self.num_steps += 1
        self.num_slots = len(tenants)
        # Not the least: whoever comes back would be ahead of all who wait, always, and
        # those who ask for a little more than others would starve beside the rest.
        # Each once, however many slots it has, or a busy one would be its own measure.
        levels_s = sorted([tenant.service_s for tenant in set(tenants)])
        level_s = levels_s[(len(levels_s) - 1) // 2]
        for longest in self._since.values():  # who waits has no more than most, or less
            level_s = min(level_s, longest.service_s)
            break
        self._virtual_s = max(self._virtual_s, level_s)
        is_unlike = len({tenant.weight for tenant in tenants}) > 1
        for tenant, cost_s in zip(tenants, costs_s, strict=True):
            tenant.service_s += (own_s := cost_s / tenant.weight)
            if is_unlike:  # who had what nobody else wanted does not owe it for ever
                most_s = max(_BURST * self._unit_s(), 2 * own_s)
                tenant.service_s = min(tenant.service_s, self._virtual_s + most_s)
            tenant.level_s, tenant.since = self._virtual_s, self.num_steps
            if self._since.pop(tenant.name, None):
                self._since[tenant.name] = tenant

    def place(self, tenant: Tenant) -> None:
        """Put a waiting tenant where it belongs now; a parked one stays where it is."""
        self._num_stamps += 1
        tenant.stamp = self._num_stamps
        if tenant.is_parked:
            return
        deadline_s, request, _, _, _, _ = tenant.queue[0]
        if self._is_round_robin:
            key, heap = (tenant.turn, request), self._patient
        elif deadline_s == math.inf or self.is_ahead(tenant):
            # Who is level with others comes as it came, or was served: by service alone
            # whoever asks for a little more than most would be last until all had their
            # turn. That others were served since is no reason to come after them again.
            band_s, own_s = _LEVEL * self._unit_s(), tenant.level_s
            if tenant.weight * len(self._since) > _HEAVY * self._weight:
                own_s = min(own_s, tenant.service_s + band_s)  # it may well be behind
            key = max(tenant.service_s - band_s, own_s), tenant.since, request
            heap = self._patient
        else:
            key, heap = (deadline_s, tenant.service_s, request), self._urgent
        heapq.heappush(heap, (key, tenant.stamp, tenant))
        if len(heap) > 8 * len(self.waiting) + 64:  # many changes, few decisions
            heap[:] = [e for e in heap if e[2].stamp == e[1] and not e[2].is_parked]
            heapq.heapify(heap)

    def is_ahead(self, tenant: Tenant) -> bool:
        """Return whether a tenant had more than its share: steps more than others.

        Its deadlines do not put it before those who had less. That is measured by who
        was passed over longest, too: most who are served may all be beyond theirs.
        """
        longest = next(iter(self._since.values()), tenant)
        least_s = min(longest.level_s, self._virtual_s)
        unit_s, part = self._unit_s(), 1.0
        # Less of a burst for who weighs less: one after the other's would take what is
        # a heavy one's, whose service is behind theirs all the time.
        if self._weight > 0.0:
            part = min(part, tenant.weight * len(self._since) / self._weight)
        most_s = max(_BURST * part, _AHEAD) * unit_s
        if tenant.service_s > tenant.began_s + most_s:
            most_s = _AHEAD * unit_s
        return tenant.service_s > least_s + most_s

    @property
    def least_s(self) -> float:
        """Return the service that counts as least: more than so far behind nobody is.

        Who cannot have its share for long, for its lane has no room, saves up no more.
        """
        return self._virtual_s - _BURST * self._unit_s()

    def _unit_s(self) -> float:
        """Return the service that a step is to a tenant of the mean weight."""
        if self._weight <= 0.0:  # nobody, or what rounding left of unlike weights
            return self._step_s
        return self._step_s * len(self._since) / self._weight

    def _await(self, tenant: Tenant) -> None:
        self._since[tenant.name] = tenant
        self._weight += tenant.weight
        bisect.insort(self._weights, tenant.weight)
        self.lines.enter(tenant)

    def _unawait(self, tenant: Tenant) -> None:
        if self._since.pop(tenant.name, None):
            self.lines.leave(tenant)
            self._weight -= tenant.weight
            del self._weights[bisect.bisect_left(self._weights, tenant.weight)]
            if self._weight < 1e-6 * tenant.weight:  # the others' would be rounding
                self._weight = math.fsum(each.weight for each in self._since.values())

    def park(self, tenant: Tenant) -> None:
        """Set a tenant aside until its lane has something new for it."""
        tenant.is_parked = True
        self._num_parked += len(tenant.queue)
        self._unawait(tenant)
        self._parked.setdefault(tenant.lane, {})[tenant.name] = tenant

    def unpark(self, lane: str | None) -> None:
        """Let the tenants of a lane (or of none) try again."""
        for tenant in self._parked.pop(lane, {}).values():
            self._retry(tenant)

    def _retry(self, tenant: Tenant) -> None:
        """Have a tenant that was parked wait like all others."""
        tenant.is_parked = False
        self._num_parked -= len(tenant.queue)
        tenant.since = self.num_steps  # nothing could serve it until now
        self._await(tenant)
        self.place(tenant)

    def _unpark(self, tenant: Tenant) -> None:
        """Let one try again: another request of it comes first now."""
        for parked in self._parked.values():
            parked.pop(tenant.name, None)
        self._retry(tenant)

    def in_order(self, *, is_patient_first: bool) -> Iterator[Tenant]:
        """Take tenants out of the heaps in order; whoever stays has to be placed.

        Args:
            is_patient_first: whether one without deadlines comes before all others.
        """
        if tenant := self._passed_over():
            tenant.stamp = 0
            yield tenant
        if is_patient_first and (tenant := self._pop(self._patient)):
            yield tenant
        while tenant := self._pop(self._urgent) or self._pop(self._patient):
            yield tenant

    def late(self, tenant: Tenant, until_s: float) -> list[int]:
        """Return a tenant's requests whose deadlines are not after a time."""
        found = []
        for entry in tenant.queue:
            if entry.deadline_s > until_s:
                break
            found.append(entry.request)
        return found

    def expired(self, now_s: float) -> list[int]:
        """Take requests whose deadline has passed off their queues, and return them."""
        found = []
        while (top := self._first_expiring()) and top[0] <= now_s:
            late = self.late(top[2], now_s)
            self.drop(top[2], late)
            found += late
        return found

    def next_deadline_s(self) -> float:
        """Return the earliest deadline of all, infinite if there is none."""
        top = self._first_expiring()
        return top[0] if top else math.inf

    def _passed_over(self) -> Tenant | None:
        """Return who waits for twice as long as its share of all slots takes to come.

        That is two rounds of all who wait, if they weigh the same.
        """
        if self._is_round_robin:
            return None
        for tenant in self._since.values():
            passed = (self.num_steps - tenant.since) * self.num_slots
            if passed * tenant.weight > _ROUNDS * self._weight:
                return tenant
            if passed * self._weights[-1] <= _ROUNDS * self._weight:
                return None  # whoever weighs more waits for less long
        return None

    def _first_expiring(self) -> Any:
        heap = self._expiring
        while heap and heap[0][2].head_s != heap[0][0]:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def _pop(self, heap: list[Any]) -> Tenant | None:
        while heap:
            _, stamp, tenant = heapq.heappop(heap)
            if tenant.stamp == stamp and not tenant.is_parked:
                tenant.stamp = 0
                return tenant
        return None

    def _count(self, tenant: Tenant, rows: int, num_bytes: int) -> None:
        tenant.rows += rows
        tenant.num_bytes += num_bytes
        self.rows += rows
        self.num_bytes += num_bytes
        if tenant.is_parked:
            self._num_parked += 1 if rows > 0 else -1

    def _moved(self, tenant: Tenant, before_s: float) -> None:
        """Take note that a tenant's first deadline may have changed."""
        after_s = tenant.head_s
        if before_s == after_s:
            return
        if tenant.size:
            self.lines.change(tenant, before_s)
        if after_s < math.inf:
            self._num_stamps += 1
            heap = self._expiring
            heapq.heappush(heap, (after_s, self._num_stamps, tenant))
            if len(heap) > 8 * len(self.waiting) + 64:  # many came and went since
                heap[:] = [e for e in heap if e[2].head_s == e[0]]
                heapq.heapify(heap)
