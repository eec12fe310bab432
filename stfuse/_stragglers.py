"""Which jobs are better off in a lane of their own. No clock, no thread, no JAX.

Jobs of one program form a *group*; a lane's groups share its steps. In the bucket that
a lane uses most, each group's marginal cost is the measured time of the step less that
of the step without it: the time of the bucket that lacks it where there is one, else of
steps in which it had nothing to do, else the groups' own buckets say how the step's
time divides.

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
import statistics
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
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
        use: the share of steps in which it had work, 0 to 1.
        share: its weight over the whole lane's.
        others_slo_s: the shortest SLO of the others.
    """

    with_s: float
    without_s: float
    alone_s: float
    use: float = 1.0
    share: float = 0.5
    others_slo_s: float = math.inf

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

    def busiest(self, lane: str, groups: Sequence[Group]) -> Bucket | None:
        """Return the bucket of most steps among those that groups share."""
        counts = {
            bucket: len(steps)
            for (of, bucket), steps in self._seen.items()
            if of == lane and sum(map(bool, _parts(bucket, groups))) > 1
        }
        return max(counts, key=lambda b: (counts[b], b), default=None)


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
        min_steps: fewer say nothing.

    Returns:
        By group; empty while too little is known.
    """
    bucket = watch.busiest(lane, list(groups.values()))
    steps = watch.steps(lane, bucket) if bucket is not None else []
    if bucket is None or len(steps) < min_steps:
        return {}
    alone = {key: alone_s(bucket, of, step_s) for key, of in groups.items()}
    apart = {key: seconds for key, seconds in alone.items() if seconds is not None}
    weight = sum(of.weight for of in groups.values())
    found = {}
    for key, own_s in apart.items():
        of = groups[key]
        if not own_s:
            continue  # it takes no part in this bucket
        busy = [seconds for seconds, who in steps if who & of.jobs]
        idle = [seconds for seconds, who in steps if not who & of.jobs]
        with_s = statistics.median(busy or idle)
        known = [with_s * (1 - own_s / sum(apart.values()))]
        rest = without(bucket, of)
        if rest in step_s:
            known = [step_s[rest]]
        if busy and idle:
            known.append(statistics.median(idle))
        found[key] = Measured(
            with_s=with_s,
            without_s=min(*known, with_s),
            alone_s=own_s,
            use=len(busy) / len(steps),
            share=of.weight / weight,
            others_slo_s=min(
                (g.slo_s for k, g in groups.items() if k != key), default=math.inf
            ),
        )
    return found


def worst(measured: Mapping[Hashable, Measured]) -> tuple[Hashable, str] | None:
    """Return the group to be evicted that costs the others most, and why."""
    reasons = {key: m.reason() for key, m in measured.items()}
    bad = [key for key, reason in reasons.items() if reason is not None]
    if not bad:
        return None
    key = max(bad, key=lambda k: measured[k].with_s - measured[k].without_s)
    return key, reasons[key] or ""


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


def _parts(bucket: Bucket, groups: Sequence[Group]) -> list[int]:
    return [sum(bucket.slots[s] for s in of.species) for of in groups]


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
