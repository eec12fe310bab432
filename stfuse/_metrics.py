"""Folds step records into a frozen Snapshot, off the hot path."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from stfuse._types import Bucket, StepRecord

_RATIO = 1.05  # latency bins; a quantile is at most this much too high
_PER_LOG = 1 / math.log(_RATIO)
_FIRST_S = 1e-6
_MOST_RECORDS = 1024  # unfolded ones
_REJECTIONS = ("queue_full", "predicted_miss", "unavailable")
_KINDS = ("rejected", *_REJECTIONS, "expired", "failed", "cancelled", "evictions")


@dataclass(frozen=True, slots=True)
class TenantStats:
    """What one tenant got.

    Attributes:
        served: answers given.
        rows: rows answered.
        late: answers given after their deadline.
        expired: requests dropped because their deadline passed while they waited.
        rejected: requests refused at submission, for one of the next three reasons.
        queue_full: its queue, or all of them, had no room.
        predicted_miss: its deadline had passed, or was predicted to.
        unavailable: the device was lost, or the job in quarantine.
        failed: requests answered with an error of the device.
        cancelled: requests given up by their owner.
        queued: requests waiting now.
        generation: how often its weights were swapped.
        lane: the lane that serves it; None until it is ready.
        evictions: how often it was moved to a lane of its own.
        quarantine: why its requests are refused; None if they are not.
        p50_s: median latency of an answer from submission, seconds.
        p99_s: its 99th percentile.
    """

    served: int = 0
    rows: int = 0
    late: int = 0
    expired: int = 0
    rejected: int = 0
    queue_full: int = 0
    predicted_miss: int = 0
    unavailable: int = 0
    failed: int = 0
    cancelled: int = 0
    evictions: int = 0
    queued: int = 0
    generation: int = 0
    lane: str | None = None
    quarantine: str | None = None
    p50_s: float = math.nan
    p99_s: float = math.nan

    @property
    def shed(self) -> int:
        """Requests that were refused or dropped so that others could be served."""
        return self.queue_full + self.predicted_miss + self.expired


@dataclass(frozen=True, slots=True)
class BucketStats:
    """What one compiled shape did.

    Attributes:
        steps: how often it ran.
        predicted_s: mean predicted step time, seconds.
        measured_s: mean measured step time, seconds.
        measured_p50_s: its median.
        measured_p99_s: its 99th percentile.
        prediction_error: mean of ``abs(measured / predicted - 1)``.
    """

    steps: int
    predicted_s: float
    measured_s: float
    measured_p50_s: float = math.nan
    measured_p99_s: float = math.nan
    prediction_error: float = math.nan


@dataclass(frozen=True, slots=True)
class HostStats:
    """Host time of a step on the device thread, mean seconds, the device's apart.

    Attributes:
        decide_s: choosing who runs.
        stage_s: filling its buffers.
        launch_s: starting it.
        answer_s: cutting its outputs and resolving futures.
        fold_s: folding records into counts, while the device works.
    """

    decide_s: float = 0.0
    stage_s: float = 0.0
    launch_s: float = 0.0
    answer_s: float = 0.0
    fold_s: float = 0.0


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
        device_s: mean measured device time of a step, seconds.
        host: mean host time of a step, by stage.
        restarts: how often the serving loop failed and began anew.
        problem: why nothing is served now; empty if all is well.
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
    device_s: float = 0.0
    host: HostStats = HostStats()
    restarts: int = 0
    problem: str = ""


class Quantiles:
    """Quantiles of positive numbers in fixed memory: a histogram of equal ratios."""

    def __init__(self) -> None:
        """Start empty."""
        self._counts: dict[int, int] = {}
        self._total = 0

    def add(self, x: float) -> None:
        """Count one number."""
        place = math.ceil(math.log(max(x, _FIRST_S) / _FIRST_S) * _PER_LOG)
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
    served: int = 0
    rows: int = 0
    late: int = 0
    latency: Quantiles = field(default_factory=Quantiles)


@dataclass(slots=True)
class _BucketTally:
    steps: int = 0
    predicted_s: float = 0.0
    measured_s: float = 0.0
    error: float = 0.0
    measured: Quantiles = field(default_factory=Quantiles)

    def add(self, predicted_s: float, measured_s: float) -> None:
        self.steps += 1
        self.predicted_s += predicted_s
        self.measured_s += measured_s
        self.measured.add(measured_s)
        if predicted_s > 0:
            self.error += abs(measured_s / predicted_s - 1)

    def stats(self) -> BucketStats:
        n = self.steps
        return BucketStats(
            steps=n,
            predicted_s=self.predicted_s / n,
            measured_s=self.measured_s / n,
            measured_p50_s=self.measured.quantile(0.5),
            measured_p99_s=self.measured.quantile(0.99),
            prediction_error=self.error / n,
        )


class Metrics:
    """Counts. The engine's lock guards what is written, one of its own the folding.

    Records are kept as they come and folded where nobody waits: by the device thread
    while the device works, and by whoever asks for a snapshot.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self._records: deque[StepRecord] = deque()
        self._folding = threading.Lock()
        self._counts: dict[tuple[str, str], int] = {}
        self._tenants: dict[str, _Tally] = {}
        self._buckets: dict[tuple[str, Bucket], _BucketTally] = {}
        self._host_s = [0.0] * len(fields(HostStats))
        self._steps = self._served = self._rows = 0
        self._tenants_seen = self._slots_rows = 0
        self._device_s = 0.0

    def record(self, record: StepRecord) -> None:
        """Keep a step's record; it is folded later."""
        self._records.append(record)
        if len(self._records) >= _MOST_RECORDS:
            self._fold_all()

    def count(self, tenant: str, kind: str, n: int = 1) -> None:
        """Count an event of one tenant: a field of `TenantStats`."""
        key = (tenant, kind)
        self._counts[key] = self._counts.get(key, 0) + n

    def add_host(self, *stages_s: float) -> None:
        """Count one step's host seconds, as in `HostStats`; only one thread may."""
        for i, seconds in enumerate(stages_s):
            self._host_s[i] += max(seconds, 0.0)  # a clock may jump back

    def fold_some(self) -> None:
        """Fold a few records, more than come in meanwhile; never wait for it."""
        if self._folding.acquire(blocking=False):
            try:
                for _ in range(min(2, len(self._records))):
                    self._fold(self._records.popleft())
            finally:
                self._folding.release()

    def forget(self, tenant: str) -> None:
        """Drop a tenant that left, and a lane that was its own."""
        self._fold_all()
        with self._folding:
            self._tenants.pop(tenant, None)
            for kind in _KINDS:
                self._counts.pop((tenant, kind), None)
            for key in [key for key in self._buckets if key[0] == tenant]:
                del self._buckets[key]

    def forget_lane(self, lane: str) -> None:
        """Drop the buckets of a lane that ended."""
        self._fold_all()
        with self._folding:
            for key in [key for key in self._buckets if key[0] == lane]:
                del self._buckets[key]

    def snapshot(
        self,
        *,
        queued: Mapping[str, int],
        generations: Mapping[str, int],
        lanes: Mapping[str, str | None],
        compiles: int,
        quarantine: Mapping[str, str | None] | None = None,
        restarts: int = 0,
        problem: str = "",
    ) -> Snapshot:
        """Return everything so far.

        Args:
            queued: waiting requests of every tenant in the engine.
            generations: their weights' generations.
            lanes: their lanes.
            compiles: steps compiled.
            quarantine: why tenants are refused; those that are not may be left out.
            restarts: of the serving loop.
            problem: why nothing is served.
        """
        self._fold_all()
        refused = quarantine or {}
        with self._folding:
            tenants = {
                name: self._tenant(
                    name,
                    queued=waiting,
                    generation=generations[name],
                    lane=lanes[name],
                    quarantine=refused.get(name),
                )
                for name, waiting in queued.items()
            }
            steps = max(self._steps, 1)
            return Snapshot(
                tenants=tenants,
                buckets={
                    f"{lane} {bucket}": tally.stats()
                    for (lane, bucket), tally in self._buckets.items()
                },
                steps=self._steps,
                served=self._served,
                rows=self._rows,
                queued=sum(queued.values()),
                compiles=compiles,
                tenants_per_step=self._tenants_seen / steps,
                rows_per_step=self._rows / steps,
                waste=self._slots_rows / self._rows - 1 if self._rows else 0.0,
                device_s=self._device_s / steps,
                host=HostStats(*(seconds / steps for seconds in self._host_s)),
                restarts=restarts,
                problem=problem,
            )

    def _fold_all(self) -> None:
        with self._folding:
            while self._records:
                self._fold(self._records.popleft())

    def _tenant(self, name: str, **now: Any) -> TenantStats:
        tally = self._tenants.get(name) or _Tally()
        counts = {kind: self._counts.get((name, kind), 0) for kind in _KINDS}
        counts["rejected"] += sum(counts[kind] for kind in _REJECTIONS)
        return TenantStats(
            served=tally.served,
            rows=tally.rows,
            late=tally.late,
            **counts,
            p50_s=tally.latency.quantile(0.5),
            p99_s=tally.latency.quantile(0.99),
            **now,
        )

    def _fold(self, record: StepRecord) -> None:
        rows = sum(record.rows.values())
        self._steps += 1
        self._tenants_seen += len(record.rows)
        self._rows += rows
        self._slots_rows += sum(record.bucket.slots) * record.bucket.rows
        self._device_s += record.step_s
        key = (record.lane, record.bucket)
        if key not in self._buckets:
            self._buckets[key] = _BucketTally()
        self._buckets[key].add(record.predicted_s, record.step_s)
        for name, latencies_s in record.latencies_s.items():
            tally = self._tenants.get(name)
            if tally is None:
                tally = self._tenants[name] = _Tally()
            self._served += len(latencies_s)
            tally.served += len(latencies_s)
            tally.rows += record.rows[name]
            tally.late += record.late.get(name, 0)
            for latency_s in latencies_s:
                tally.latency.add(latency_s)
