"""What can run: a lane's buckets with their predicted times, and how one is filled."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stfuse._queues import Tenant
from stfuse._types import Bucket, Chunk

# Slots that a tenant may have beyond its claim where they are left free: the device has
# them for nothing, but the host works for each as for one that counts.
BEYOND = 2


class Times(NamedTuple):
    """Predicted seconds of a step.

    Attributes:
        step_s: the median.
        p99_s: the 99th percentile.
        cost_s: of device or host, whichever such a step keeps busy for longer: as one
            follows another, none can be had sooner.
    """

    step_s: float
    p99_s: float
    cost_s: float


@dataclass(slots=True)
class LaneBuckets:
    """What serves some tenants.

    Attributes:
        capacities: slots of each species' bank.
        members: who they are.
        ready: predicted times by bucket, fewest rows first.
        slots: most slots of a step.
        rows: most rows of a slot.
        open_slots: most slots of a step in which it may have several; 0 for none.
        sizes: slots of each bucket, in the order of ``ready``.
        most: slots of each species in the bucket that has most of it.
        step_s: average seconds of the last steps; 0 before the first.
        full_slots: average slots of a full step that take as long as a step lately.
        own: by species, what is known of a tenant's own slots; empty after a change.
    """

    capacities: tuple[int, ...]
    members: tuple[str, ...]
    ready: dict[Bucket, Times] = field(default_factory=dict)
    slots: int = 0
    rows: int = 0
    open_slots: int = 0
    sizes: dict[Bucket, int] = field(default_factory=dict)
    most: list[int] = field(default_factory=list)
    step_s: float = 0.0
    full_slots: float = 0.0
    own: dict[tuple[int, ...], tuple[int, float]] = field(default_factory=dict)
    _least_s: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    def predict(self, bucket: Bucket, times: Times) -> bool:
        """Take note of what a step takes; return whether its bucket is new."""
        self._least_s.clear()
        self.own.clear()
        is_new = bucket not in self.ready
        self.ready[bucket] = times
        if is_new:
            self._sort()
        return is_new

    def _sort(self) -> None:
        self.ready = dict(sorted(self.ready.items(), key=lambda item: item[0].rows))
        self.rows = next(reversed(self.ready)).rows
        self.sizes = {bucket: sum(bucket.slots) for bucket in self.ready}
        self.most = [
            *map(max, zip(*[bucket.slots for bucket in self.ready], strict=True))
        ]
        self.slots = max(self.sizes.values())
        self.open_slots = max(
            [self.sizes[each] for each in self.ready if not self._is_dense(each)],
            default=0,
        )

    def most_slots(self, num_programs: int, num_alike: int) -> int:
        """Return how many slots of one step a tenant can get at most.

        Args:
            num_programs: that it has.
            num_alike: tenants that wait for slots of the same species, this one too:
                each gets one before any gets another.
        """
        return num_programs * (1 + max(self.open_slots - num_alike, 0))

    def room(self, bucket: Bucket, num_taken: int) -> int:
        """Return how many slots more those in a step may have, and none be left out.

        So many find a place in the best step for them, as measured.

        Args:
            bucket: the best for those in it.
            num_taken: slots that they have.
        """
        if len(self.capacities) > 1:  # the others may be another program's
            return 0
        size, cost_s = num_taken, self.ready[bucket].cost_s
        if not self._is_dense(bucket):
            size = self.sizes[bucket]
        larger = [
            (num, self.ready[each].cost_s)
            for each, num in self.sizes.items()
            if num > size and each.rows == bucket.rows and not self._is_dense(each)
        ]
        for num, next_s in sorted(larger):
            if num == size:  # a slower one of as many
                continue
            if (size + 1) / next_s < size / cost_s:
                break
            size, cost_s = num, next_s
        return size - num_taken

    def slot_s(self, species: int, rows: int) -> float:
        """Return what a slot of a species and some rows takes at least, seconds.

        Infinite if none that is ready has one of so many.
        """
        return self._least(species, rows)[0]

    def shortest_s(self, species: int, rows: int) -> float:
        """Return what the shortest step with such a slot takes, seconds."""
        return self._least(species, rows)[1]

    def _least(self, species: int, rows: int) -> tuple[float, float]:
        found = self._least_s.get((species, rows))
        if found is None:
            pairs = [
                (times.cost_s / self.sizes[bucket], times.step_s)
                for bucket, times in self.ready.items()
                if bucket.slots[species] and bucket.rows >= rows
            ]
            least = [min(each) for each in zip(*pairs, strict=True)]
            found = (least[0], least[1]) if least else (math.inf, math.inf)
            self._least_s[species, rows] = found
        return found

    def _is_dense(self, bucket: Bucket) -> bool:
        pairs = zip(bucket.slots, self.capacities, strict=True)
        return not bucket.is_open and all([k in (0, own) for k, own in pairs])


def fill(
    lane: LaneBuckets,
    bucket: Bucket,
    chunks: Sequence[Sequence[Chunk]],
    claims: Mapping[str, int] | None = None,
) -> list[Chunk]:
    """Return what a bucket would serve: a slot for each tenant, then seconds.

    Where a bank runs as a whole, a tenant has its own slot only.

    Args:
        lane: of the bucket.
        bucket: which shape.
        chunks: what each tenant would have in it, in order.
        claims: slots of each that count: these come first; None for all.
    """
    firsts, others = _turns(chunks, claims)
    left = list(bucket.slots)
    picked: list[Chunk] = []
    for chunk in firsts:
        if left[chunk.species]:
            left[chunk.species] -= 1
            picked.append(chunk)
    if not others or not any(left):
        return picked
    held = {(chunk.tenant, chunk.species) for chunk in picked}
    pairs = zip(bucket.slots, lane.capacities, strict=True)
    is_dense = [num == most and not bucket.is_open for num, most in pairs]
    for chunk in others:
        species, who = chunk.species, (chunk.tenant, chunk.species)
        if left[species] and not (is_dense[species] and who in held):
            left[species] -= 1
            picked.append(chunk)
            held.add(who)
    return picked


def _turns(
    chunks: Sequence[Sequence[Chunk]], claims: Mapping[str, int] | None
) -> tuple[list[Chunk], list[Chunk]]:
    """Return the first slots of those who have a claim, then all others in order."""
    if claims is None:
        firsts = [own[0] for own in chunks if own]
        return firsts, [chunk for own in chunks for chunk in own[1:]]
    firsts, claimed, beyond, last = [], [], [], []
    for own in chunks:
        num = claims[own[0].tenant] if own else 0
        firsts += own[: min(num, 1)]
        claimed += own[1:num]
        beyond += own[num : num + 1]
        last += own[num + 1 :]
    return firsts, [*claimed, *beyond, *last]


def dues(
    lane: LaneBuckets,
    mates: Sequence[Tenant],
    least_s: float,
    is_ahead: Callable[[Tenant], bool],
) -> dict[str, int] | None:
    """Return how many slots of a full step each is due, None if all weigh the same.

    The first in order has one; each that is left goes to whoever had least service for
    its weight by then (fair queueing by start times, Goyal et al. 1996). Who has a
    deadline and is not beyond its share comes before the others.

    Args:
        lane: theirs.
        mates: who may be in the step, in order.
        least_s: the service of whoever had less.
        is_ahead: whether one had so much that its deadlines do not count.
    """
    if len({tenant.weight for tenant in mates}) == 1:
        return None
    found, heap = dict.fromkeys([tenant.name for tenant in mates], 0), []
    left = list(lane.most)
    for i, tenant in enumerate(mates):
        deadline_s, _, rows, _, length, _ = tenant.queue[0]
        slot_s = lane.slot_s(tenant.species[length], rows) / tenant.weight
        had_s = max(tenant.service_s, least_s)
        if deadline_s < math.inf and not is_ahead(tenant):
            had_s = least_s
        if i == 0:
            found[tenant.name], had_s = 1, had_s + slot_s
            left[tenant.species[length]] -= 1
        if slot_s < math.inf:
            heap.append((had_s, i, slot_s))
    heapq.heapify(heap)
    num_left = lane.slots - 1
    while heap and num_left > 0:
        had_s, i, slot_s = heap[0]
        tenant = mates[i]
        species = tenant.species[tenant.queue[0].length]
        most = lane.most_slots(len(tenant.species), 1)
        most = min(most, -(-tenant.rows // lane.rows))  # what its rows can fill
        if found[tenant.name] >= most or left[species] <= 0:
            heapq.heappop(heap)
        else:
            found[tenant.name] += 1
            left[species], num_left = left[species] - 1, num_left - 1
            heapq.heapreplace(heap, (had_s + slot_s, i, slot_s))
    return found


def best(
    lane: LaneBuckets,
    mates: Sequence[Tenant],
    *,
    now_s: float,
    is_one: bool,
    any_time: bool,
    claims: Mapping[str, int] | None = None,
    spare: int = BEYOND,
    longest_s: float = math.inf,
) -> tuple[Bucket, list[Chunk]] | None:
    """Return the bucket of most rows a second that serves the first tenant.

    Args:
        lane: theirs.
        mates: who may be in it, in order.
        now_s: the time.
        is_one: whether a step has one request.
        any_time: whether it counts alike that the first is answered in time, or not.
        claims: how many slots of each tenant count; None for all.
        spare: slots that each may have beyond those, where they are left free.
        longest_s: what it may take, if any takes no longer.
    """
    first = mates[0]
    head_s, _, least, _, length, _ = first.queue[0]
    own_species = first.species[length]
    limits = _limits(lane, mates, claims, spare)
    cut: list[list[Chunk]] = []
    is_whole = False  # every queue fits in one slot: more rows would change nothing
    has_several = False  # slots for some tenant: what an open step is for
    max_rows = most = 0  # of a slot, and of all that there is to serve
    found = []  # what each bucket could do at best
    for bucket, times in lane.ready.items():
        if bucket.rows < least or not bucket.slots[own_species]:
            continue
        if bucket.rows != max_rows:
            max_rows = bucket.rows
            if not is_whole:
                of_mates = zip(mates, limits, strict=True)
                cut = [_chunks(t, max_rows, limit, is_one) for t, limit in of_mates]
                is_whole = all(map(_is_whole, cut, mates))
                has_several = max(map(len, cut)) > 1
                most = _most(cut, [claims[t.name] for t in mates] if claims else limits)
        if bucket.is_open and not has_several:
            continue
        is_in_time = any_time or now_s + times.p99_s <= head_s
        rows = min(most, lane.sizes[bucket] * max_rows)
        found.append((is_in_time, rows / times.cost_s, bucket, times, cut))
    if found and longest_s < math.inf:
        longest_s = max(longest_s, min(times.step_s for _, _, _, times, _ in found))
        found = [each for each in found if each[3].step_s <= longest_s]
    found.sort(key=lambda each: each[:2], reverse=True)
    chosen: tuple[Bucket, list[Chunk]] | None = None
    best_score = (False, 0.0)
    for is_in_time, rate, bucket, times, own in found:
        if (is_in_time, rate) <= best_score:
            break  # nor can any that follows
        chunks = fill(lane, bucket, own, claims)
        score = (is_in_time, _rows(chunks, claims) / times.cost_s)
        serves_first = chunks and chunks[0].tenant == first.name
        if serves_first and score > best_score:
            chosen, best_score = (bucket, chunks), score
    return chosen


def _limits(
    lane: LaneBuckets,
    mates: Sequence[Tenant],
    claims: Mapping[str, int] | None,
    spare: int,
) -> list[int]:
    """Return the most slots that each tenant can get, if it waits for several."""
    if max([len(tenant.queue) for tenant in mates]) == 1:
        return [1] * len(mates)
    # Who compete for the same slots: where only claims count, those who have one.
    alike = Counter([t.species for t in mates if not claims or claims[t.name]])
    species = {tenant.species for tenant in mates}
    slots = {of: lane.most_slots(len(of), max(alike[of], 1)) for of in species}
    if claims is None:
        return [slots[t.species] for t in mates]
    return [min(slots[t.species], claims[t.name] + spare) for t in mates]


def _chunks(tenant: Tenant, max_rows: int, limit: int, is_one: bool) -> list[Chunk]:
    """Cut the front of a queue into slots; stop at a request that fits none."""
    first = tenant.queue[: 1 if is_one else limit]
    is_alone = is_one or len(tenant.queue) == 1
    if first[0].rows == max_rows or (is_alone and first[0].rows < max_rows):
        if is_alone or all([entry.rows == max_rows for entry in first]):
            name, of = tenant.name, tenant.species
            return [Chunk(name, (r,), n, at, of[at]) for _, r, n, _, at, _ in first]
    found: list[tuple[list[int], int, int]] = []  # requests, rows, length
    place: dict[int, int] = {}  # where each length's last chunk stands
    for entry in tenant.queue:
        size, length = entry.rows, entry.length
        if size > max_rows:
            break
        at = place.get(length)
        if at is not None and found[at][1] + size <= max_rows and not is_one:
            requests, rows, _ = found[at]
            requests.append(entry.request)
            found[at] = (requests, rows + size, length)
            continue
        if len(found) == (1 if is_one else limit):
            break
        place[length] = len(found)
        found.append(([entry.request], size, length))
    return [
        Chunk(tenant.name, tuple(requests), rows, length, tenant.species[length])
        for requests, rows, length in found
    ]


def _most(cut: Sequence[Sequence[Chunk]], limits: Sequence[int]) -> int:
    """Return the rows of the first chunks of each tenant, as many as count."""
    pairs = zip(cut, limits, strict=True)
    return sum([chunk.rows for own, num in pairs for chunk in own[:num]])


def _rows(chunks: Sequence[Chunk], claims: Mapping[str, int] | None) -> int:
    """Return the rows of chunks, of so many of each tenant."""
    if claims is None:
        return sum([chunk.rows for chunk in chunks])
    rows, left = 0, {}
    for tenant, _, own, _, _ in chunks:
        count = left.get(tenant)
        if count is None:
            count = claims[tenant]
        left[tenant] = count - 1
        if count > 0:
            rows += own
    return rows


def _is_whole(own: Sequence[Chunk], tenant: Tenant) -> bool:
    return len(own) == 1 and len(own[0].requests) == len(tenant.queue)
