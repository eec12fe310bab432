"""Folds step records into a frozen Snapshot, off the hot path."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from stfuse._types import Bucket, StepRecord

_RATIO = 1.05  # latency bins; a quantile is at most this much too high
_FIRST_S = 1e-6


@dataclass(frozen=True, slots=True)
class TenantStats:
    """What one tenant got.

    Attributes:
        served: answers given.
        rows: rows answered.
        late: answers given after their deadline.
        expired: requests dropped because their deadline passed while they waited.
        rejected: requests refused at submission.
        failed: requests answered with an error of the device.
        cancelled: requests given up by their owner.
        queued: requests waiting now.
        generation: how often its weights were swapped.
        lane: the lane that serves it; None until it is ready.
        p50_s: median latency of an answer from submission, seconds.
        p99_s: its 99th percentile.
    """

    served: int = 0
    rows: int = 0
    late: int = 0
    expired: int = 0
    rejected: int = 0
    failed: int = 0
    cancelled: int = 0
    queued: int = 0
    generation: int = 0
    lane: str | None = None
    p50_s: float = math.nan
    p99_s: float = math.nan


@dataclass(frozen=True, slots=True)
class BucketStats:
    """What one compiled shape did.

    Attributes:
        steps: how often it ran.
        predicted_s: mean predicted step time, seconds.
        measured_s: mean measured step time, seconds.
    """

    steps: int
    predicted_s: float
    measured_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine at one moment; counts are since it started.

    Attributes:
        tenants: by name, those that are in the engine now.
        buckets: by lane and bucket, such as ``all 16+8x4``.
        steps: steps run.
        served: answers given.
        rows: rows answered.
        queued: requests waiting now.
        compiles: steps compiled, off the request path.
        tenants_per_step: mean number of different tenants in a step.
        rows_per_step: mean number of true rows in a step.
        waste: computed rows over true rows, minus one.
    """

    tenants: Mapping[str, TenantStats]
    buckets: Mapping[str, BucketStats]
    steps: int
    served: int
    rows: int
    queued: int
    compiles: int
    tenants_per_step: float
    rows_per_step: float
    waste: float


class Quantiles:
    """Quantiles of positive numbers in fixed memory: a histogram of equal ratios."""

    def __init__(self) -> None:
        """Start empty."""
        self._counts: dict[int, int] = {}
        self._total = 0

    def add(self, x: float) -> None:
        """Count one number."""
        place = math.ceil(math.log(max(x, _FIRST_S) / _FIRST_S, _RATIO))
        self._counts[place] = self._counts.get(place, 0) + 1
        self._total += 1

    def quantile(self, q: float) -> float:
        """Return the upper edge of the bin that holds quantile ``q``; NaN if empty."""
        left = q * self._total
        for place in sorted(self._counts):
            left -= self._counts[place]
            if left <= 0:
                return _FIRST_S * _RATIO**place
        return math.nan


@dataclass(slots=True)
class _Tally:
    counts: dict[str, int] = field(default_factory=dict)
    latency: Quantiles = field(default_factory=Quantiles)

    def add(self, kind: str, n: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + n


@dataclass(slots=True)
class _BucketTally:
    steps: int = 0
    predicted_s: float = 0.0
    measured_s: float = 0.0


class Metrics:
    """Counts; not safe for threads by itself, the engine's lock guards it."""

    def __init__(self) -> None:
        """Start at zero."""
        self._records: deque[StepRecord] = deque()
        self._tenants: dict[str, _Tally] = {}
        self._buckets: dict[tuple[str, Bucket], _BucketTally] = {}
        self._steps = self._served = self._rows = 0
        self._tenants_seen = self._slots_rows = 0

    def record(self, record: StepRecord) -> None:
        """Keep a step's record; it is folded later."""
        self._records.append(record)
        if len(self._records) >= 1024:
            self._fold()

    def count(self, tenant: str, kind: str, n: int = 1) -> None:
        """Count an event of one tenant: a field of `TenantStats`."""
        self._tenants.setdefault(tenant, _Tally()).add(kind, n)

    def forget(self, tenant: str) -> None:
        """Drop a tenant that left, and a lane that was its own."""
        self._fold()
        self._tenants.pop(tenant, None)
        for key in [key for key in self._buckets if key[0] == tenant]:
            del self._buckets[key]

    def snapshot(
        self,
        *,
        queued: Mapping[str, int],
        generations: Mapping[str, int],
        lanes: Mapping[str, str | None],
        compiles: int,
    ) -> Snapshot:
        """Return everything so far.

        Args:
            queued: waiting requests of every tenant in the engine.
            generations: their weights' generations.
            lanes: their lanes.
            compiles: steps compiled.
        """
        self._fold()
        tenants = {}
        for name, waiting in queued.items():
            tally = self._tenants.get(name, _Tally())
            tenants[name] = TenantStats(
                **tally.counts,
                queued=waiting,
                generation=generations[name],
                lane=lanes[name],
                p50_s=tally.latency.quantile(0.5),
                p99_s=tally.latency.quantile(0.99),
            )
        steps = max(self._steps, 1)
        return Snapshot(
            tenants=tenants,
            buckets={
                f"{lane} {bucket}": BucketStats(
                    t.steps, t.predicted_s / t.steps, t.measured_s / t.steps
                )
                for (lane, bucket), t in self._buckets.items()
            },
            steps=self._steps,
            served=self._served,
            rows=self._rows,
            queued=sum(queued.values()),
            compiles=compiles,
            tenants_per_step=self._tenants_seen / steps,
            rows_per_step=self._rows / steps,
            waste=self._slots_rows / self._rows - 1 if self._rows else 0.0,
        )

    def _fold(self) -> None:
        while self._records:
            record = self._records.popleft()
            rows = sum(record.rows.values())
            self._steps += 1
            self._tenants_seen += len(record.rows)
            self._rows += rows
            self._slots_rows += sum(record.bucket.slots) * record.bucket.rows
            key = (record.lane, record.bucket)
            bucket = self._buckets.setdefault(key, _BucketTally())
            bucket.steps += 1
            bucket.predicted_s += record.predicted_s
            bucket.measured_s += record.step_s
            for name, latencies_s in record.latencies_s.items():
                tally = self._tenants.setdefault(name, _Tally())
                self._served += len(latencies_s)
                tally.add("served", len(latencies_s))
                tally.add("rows", record.rows[name])
                tally.add("late", record.late.get(name, 0))
                for latency_s in latencies_s:
                    tally.latency.add(latency_s)
