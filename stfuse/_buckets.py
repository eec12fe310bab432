"""What can run: a lane's buckets with their predicted times, and how one is filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stfuse._types import Bucket, Chunk


class Times(NamedTuple):
    """Predicted seconds of a step: the median, and the 99th percentile."""

    step_s: float
    p99_s: float


@dataclass(slots=True)
class LaneBuckets:
    """What serves some tenants.

    Attributes:
        capacities: slots of each species' bank.
        members: who they are.
        ready: predicted times by bucket, fewest rows first.
        slots: most slots of a step.
        rows: most rows of a slot.
        is_dense: whether a tenant has one slot at most in the largest step.
        open_slots: most slots of a step in which it may have several; 0 for none.
    """

    capacities: tuple[int, ...]
    members: tuple[str, ...]
    ready: dict[Bucket, Times] = field(default_factory=dict)
    slots: int = 0
    rows: int = 0
    is_dense: bool = True
    open_slots: int = 0

    def add(self, bucket: Bucket, times: Times) -> None:
        """Take note of a bucket that is new."""
        self.ready[bucket] = times
        self.ready = dict(sorted(self.ready.items(), key=lambda item: item[0].rows))
        self.rows = next(reversed(self.ready)).rows
        largest = max(self.ready, key=lambda each: (sum(each.slots), each.is_open))
        self.slots = sum(largest.slots)
        self.is_dense = self._is_dense(largest)
        self.open_slots = max(
            [sum(each.slots) for each in self.ready if not self._is_dense(each)],
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

    def _is_dense(self, bucket: Bucket) -> bool:
        pairs = zip(bucket.slots, self.capacities, strict=True)
        return not bucket.is_open and all([k in (0, own) for k, own in pairs])


def fill(
    lane: LaneBuckets, bucket: Bucket, chunks: Sequence[Sequence[Chunk]]
) -> list[Chunk]:
    """Return what a bucket would serve: a slot for each tenant, then seconds.

    Where a bank runs as a whole, a tenant has its own slot only.
    """
    left = list(bucket.slots)
    picked: list[Chunk] = []
    held: set[tuple[str, int]] = set()

    def pick(chunk: Chunk) -> None:
        s, who = chunk.species, (chunk.tenant, chunk.species)
        is_dense = bucket.slots[s] == lane.capacities[s] and not bucket.is_open
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
