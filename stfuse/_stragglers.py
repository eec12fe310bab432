"""Which jobs are better off in a lane of their own. No clock, no thread, no JAX.

Jobs of one program form a *group*; a lane's groups share its steps. In the bucket that
a lane uses most (or its largest, if it uses that one rarely because of what it costs),
each group's marginal cost is the measured time of the step less that of the step
without it. Where no bucket lacks the group, its marginal cost is at first taken for as
high as the groups' own buckets allow; if that would evict it, the bucket that lacks it
is compiled and measured before anybody moves.

Rules. A group is evicted if one of these holds, the worst one first:
    pays    its marginal cost per step that serves it exceeds what it costs alone, and
            the difference is a quarter of the step.
    slo     the others miss their SLO (two steps: the one in flight and their own)
            because of it: without it they would not.
    share   the others, which weigh at least as much, would have their steps
            `max_stretch` times faster without it.
It is tried again after a while that doubles each time it does not work out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stfuse._types import Bucket, StepRecord

_MARGIN = 1.1  # what measurements may be wrong by
_LEAST_GAIN = 0.25  # of a step: a move costs a compile
_STEPS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Group:
    """Jobs of one program in a lane.

    Attributes:
        jobs: their names.
        species: their species.
        weight: their weights together.
        slo_s: the shortest of their SLOs, or infinity.
    """

    jobs: frozenset[str]
    species: tuple[int, ...]
    weight: float = 1.0
    slo_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Measured:
    """What one group does to a step.

    Attributes:
        with_s: the step's time.
        without_s: its time without the group.
        alone_s: the group's own step.
        use: the share of these steps in which it had work, 0 to 1.
        share: its weight over the whole lane's.
        others_slo_s: the shortest SLO of the others.
        rest: the bucket without it that ought to be measured before it is evicted.
    """

    with_s: float
    without_s: float
    alone_s: float
    use: float = 1.0
    share: float = 0.5
    others_slo_s: float = math.inf
    rest: Bucket | None = None

    def reason(self, max_stretch: float = 4.0) -> str | None:
        """Return why the group should be evicted, or None."""
        marginal_s = max(self.with_s - self.without_s, 0.0)
        gain_s = marginal_s - self.use * self.alone_s
        pays = marginal_s <= _MARGIN * self.use * self.alone_s
        if not pays and gain_s > _LEAST_GAIN * self.with_s:
            return (
                f"it adds {marginal_s:.3g} s to steps of which {self.use:.0%} serve "
                f"it; alone it takes {self.alone_s:.3g} s"
            )
        late_s = _STEPS_IN_FLIGHT * self.with_s
        if late_s > self.others_slo_s >= _STEPS_IN_FLIGHT * self.without_s:
            return (
                f"the others' SLO is {self.others_slo_s:.3g} s, two steps take "
                f"{late_s:.3g} s"
            )
        if self.share <= 0.5 and self.with_s > max_stretch * self.without_s:
            return (
                f"a step takes {self.with_s:.3g} s, and {self.without_s:.3g} s without "
                f"it"
            )
        return None


class Watch:
    """Remembers the last steps of each bucket.

    Args:
        window: how many of each.
    """

    def __init__(self, window: int = 64) -> None:
        """Start with none."""
        self._window = window
        self._seen: dict[tuple[str, Bucket], deque[tuple[float, frozenset[str]]]] = {}

    def add(self, record: StepRecord) -> None:
        """Take note of a step."""
        key = (record.lane, record.bucket)
        steps = self._seen.setdefault(key, deque(maxlen=self._window))
        steps.append((record.step_s, frozenset(record.rows)))

    def steps(self, lane: str, bucket: Bucket) -> list[tuple[float, frozenset[str]]]:
        """Return the last steps of a bucket: seconds, and who had rows."""
        return list(self._seen.get((lane, bucket), ()))

    def forget(self, lane: str) -> None:
        """Drop a lane: it ended, or is another one by the same name."""
        for key in [key for key in self._seen if key[0] == lane]:
            del self._seen[key]

    def busiest(self, lane: str, among: Sequence[Bucket]) -> Bucket | None:
        """Return the bucket of most steps, None if none ran."""
        counts = {b: len(self._seen[lane, b]) for b in among if (lane, b) in self._seen}
        return max(counts, key=lambda b: counts[b], default=None)


def measure(
    lane: str,
    groups: Mapping[Hashable, Group],
    step_s: Mapping[Bucket, float],
    watch: Watch,
    *,
    min_steps: int = 32,
) -> dict[Hashable, Measured]:
    """Return what each group does to the bucket that a lane uses most.

    Args:
        lane: its name.
        groups: its groups.
        step_s: the measured time of its buckets, seconds.
        watch: saw its steps.
        min_steps: if the bucket ran less often, its first measurement counts.

    Returns:
        By group; without those that take no part or whose own bucket is unknown.
    """
    # What an open bucket adds is for the index, not for a group.
    step_s = {b: seconds for b, seconds in step_s.items() if not b.is_open}
    shared = [b for b in step_s if sum(map(bool, _parts(b, groups.values()))) > 1]
    bucket = watch.busiest(lane, shared)
    steps = watch.steps(lane, bucket) if bucket is not None else []
    if len(steps) < min_steps:
        bucket, steps = max(shared, key=_size, default=None), []
    if bucket is None:
        return {}
    alone = {key: alone_s(bucket, of, step_s) for key, of in groups.items()}
    own_s = {key: seconds for key, seconds in alone.items() if seconds}
    weight = sum(of.weight for of in groups.values())
    found = {}
    for key in own_s:
        of = groups[key]
        others = {k: seconds for k, seconds in own_s.items() if k != key}
        busy = [seconds for seconds, who in steps if who & of.jobs]
        with_s = _quiet_s(busy or [s for s, _ in steps] or [step_s[bucket]])
        rest = without(bucket, of)
        least_s = min(with_s - own_s[key], sum(others.values()))
        without_s = step_s.get(rest, max(least_s, *others.values(), 0.0))
        found[key] = Measured(
            with_s=with_s,
            without_s=min(without_s, with_s),
            alone_s=own_s[key],
            use=len(busy) / len(steps) if steps else 1.0,
            share=of.weight / weight,
            others_slo_s=min(
                (g.slo_s for k, g in groups.items() if k != key), default=math.inf
            ),
            rest=None if rest in step_s else rest,
        )
    return found


def worst(measured: Mapping[Hashable, Measured]) -> tuple[Hashable, str] | None:
    """Return the group to be evicted that costs the others most, and why.

    Those that are measured come before those that ought to be.
    """
    reasons = {key: m.reason() for key, m in measured.items()}
    bad = [key for key, reason in reasons.items() if reason is not None]
    bad = [key for key in bad if measured[key].rest is None] or bad
    if not bad:
        return None
    key = max(bad, key=lambda k: measured[k].with_s - measured[k].without_s)
    return key, reasons[key] or ""


def _quiet_s(seen_s: Sequence[float]) -> float:
    """Return a step's time on a quiet host, as the times that it is compared with.

    A busy host adds to most steps that serve requests: a median would find that a step
    costs more than the sum of its parts, which were measured with nothing else to do.
    """
    return sorted(seen_s)[len(seen_s) // 10]


def without(bucket: Bucket, group: Group) -> Bucket:
    """Return a bucket that lacks a group."""
    slots = [0 if s in group.species else k for s, k in enumerate(bucket.slots)]
    return Bucket(tuple(slots), bucket.rows)


def alone_s(
    bucket: Bucket, group: Group, step_s: Mapping[Bucket, float]
) -> float | None:
    """Return what a group's part of a bucket takes alone, None if nobody measured."""
    total_s = 0.0
    for s in group.species:
        if bucket.slots[s]:
            covering = [
                seconds
                for own, seconds in step_s.items()
                if own.rows >= bucket.rows
                and own.slots[s] >= bucket.slots[s]
                and sum(own.slots) == own.slots[s]
            ]
            if not covering:
                return None
            total_s += min(covering)
    return total_s


def _parts(bucket: Bucket, groups: Iterable[Group]) -> list[int]:
    return [sum(bucket.slots[s] for s in of.species) for of in groups]


def _size(bucket: Bucket) -> tuple[int, int]:
    return sum(bucket.slots), bucket.rows


@dataclass(slots=True)
class _Exile:
    due_s: float
    wait_s: float
    use: float


class Backoff:
    """When evicted groups are tried again.

    Args:
        first_s: how long after the first eviction, seconds.
        most_s: what the doubled waits end at.
    """

    def __init__(self, first_s: float = 30.0, most_s: float = 3600.0) -> None:
        """Start with nobody evicted."""
        self._first_s = first_s
        self._most_s = most_s
        self._exiles: dict[Hashable, _Exile] = {}

    def evict(self, key: Hashable, now_s: float, use: float = 1.0) -> float:
        """Take note that a group was evicted, again perhaps; return when it is due."""
        old = self._exiles.get(key)
        wait_s = min(2 * old.wait_s, self._most_s) if old else self._first_s
        self._exiles[key] = _Exile(now_s + wait_s, wait_s, use)
        return now_s + wait_s

    def returned(self, key: Hashable) -> None:
        """Take note that a group is back; if it is evicted again, it waits longer."""
        self._exiles[key].due_s = math.inf

    def use(self, key: Hashable) -> float:
        """Return the share of steps that served a group before it was evicted."""
        return self._exiles[key].use

    def due(self, now_s: float) -> list[Hashable]:
        """Return the groups that are to be tried again now."""
        return [key for key, exile in self._exiles.items() if exile.due_s <= now_s]

    def next_s(self) -> float:
        """Return when the next group is due, or infinity."""
        return min((exile.due_s for exile in self._exiles.values()), default=math.inf)

    def forget(self, key: Hashable) -> None:
        """Drop a group that left."""
        self._exiles.pop(key, None)
