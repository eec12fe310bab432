"""The real scheduler on a virtual clock, with a device that only takes time.

Times are seconds from the start of a trace. Axes: R requests, N tenants.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stfuse._admission import Bounds
from stfuse._arrivals import Arrivals
from stfuse._errors import DeadlineError, QueueFullError
from stfuse._options import policy_of
from stfuse._scheduler import Scheduler
from stfuse._types import Bucket, Install, Join, Policy, Ready, Submit

_MAX_IN_FLIGHT = 2
_REFUSED, _SHED, _EXPIRED = range(3)


@dataclasses.dataclass(frozen=True, slots=True)
class Simulation:
    """What became of a trace.

    Attributes:
        latency_s: from arrival to answer, float64 [R]; infinite without an answer.
        tenants: who asked, int [R].
        deadline_s: seconds that a request had, or infinity.
        refused: requests for which a queue was full.
        shed: requests refused because they were sure to be late.
        expired: requests that were taken, and dropped.
        service_s: device seconds of each tenant, float64 [N].
        weights: of each tenant, float64 [N].
        steps: steps run.
        tenants_per_step: mean number of different tenants in a step.
        busy_s: device seconds of all steps.
        end_s: when the last answer was given.
    """

    latency_s: np.ndarray
    tenants: np.ndarray
    deadline_s: float
    refused: int
    shed: int
    expired: int
    service_s: np.ndarray
    weights: np.ndarray
    steps: int
    tenants_per_step: float
    busy_s: float
    end_s: float

    @property
    def answered(self) -> int:
        """Requests that got an answer."""
        return int(np.isfinite(self.latency_s).sum())

    @property
    def in_time(self) -> int:
        """Requests that got an answer by their deadline."""
        return int((self.latency_s <= self.deadline_s).sum())

    @property
    def late(self) -> int:
        """Requests that got an answer after their deadline."""
        return self.answered - self.in_time

    @property
    def misses(self) -> float:
        """Share of all requests without an answer by their deadline."""
        return 1 - self.in_time / max(len(self.latency_s), 1)

    @property
    def goodput(self) -> float:
        """Answers by their deadline, per second."""
        return self.in_time / self.end_s if self.end_s else 0.0

    def quantile_s(self, q: float, tenants: Sequence[int] | None = None) -> float:
        """Return a quantile of the latency of answers.

        Args:
            q: from 0 to 1.
            tenants: of these only; None for all.

        Returns:
            Seconds; NaN without answers.
        """
        taken = np.isfinite(self.latency_s)
        if tenants is not None:
            taken &= np.isin(self.tenants, tenants)
        found = self.latency_s[taken]
        return float(np.quantile(found, q)) if len(found) else math.nan

    def fairness(self, tenants: Sequence[int] | None = None) -> float:
        """Return Jain's index of service over weight.

        Args:
            tenants: of these only; None for all.

        Returns:
            1 if all got the same, 1/N if one got all; NaN if nobody got anything.
        """
        shares = self.service_s / self.weights
        shares = shares if tenants is None else shares[list(tenants)]
        squares = len(shares) * float((shares**2).sum())
        return float(shares.sum()) ** 2 / squares if squares else math.nan


def simulate(
    trace: Arrivals,
    cost_table: Mapping[tuple[int, int], float],
    policy: str = "space-time",
    *,
    deadline_s: float | None = None,
    num_tenants: int | None = None,
    weights: Sequence[float] | None = None,
    max_queue_size: int = 1024,
    max_queue_delay_s: float = 0.0,
    strict_shares: bool = False,
    noise: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Run the real scheduler over a trace; no device, no thread, no waiting.

    Steps take what the table says, two may be in flight if there is a backlog, and a
    request has one row.

    Args:
        trace: who asks when.
        cost_table: ``(slots, rows)`` of a bucket to seconds of its step. Policies other
            than ``"space-time"`` use those of one slot.
        policy: ``"exclusive"``, ``"time"`` or ``"space-time"``.
        deadline_s: of every request, from its arrival; None for no deadlines.
        num_tenants: N; None for those in the trace.
        weights: of each tenant's share; None for equal ones.
        max_queue_size: most requests that one tenant may have waiting.
        max_queue_delay_s: as of `stfuse.Engine`.
        strict_shares: as of `stfuse.Engine`.
        noise: standard deviation of the logarithm of a step's time.
        seed: of the noise.

    Returns:
        What became of the requests.

    Raises:
        ValueError: an empty cost table, times that are not positive, not finite or not
            ascending, tenants or weights that are not N, or an unknown policy.

    Example:
        >>> trace = Arrivals(np.arange(50) / 100, np.arange(50) % 4)
        >>> table = {(1, 1): 0.001, (2, 1): 0.0011, (4, 1): 0.0012}
        >>> simulate(trace, table).answered
        50
    """
    _check(trace, cost_table)
    num = _num_tenants(trace, num_tenants)
    _check_options(num, weights, deadline_s)
    run = _Run(trace, num, weights, deadline_s)
    chosen = policy_of(policy)
    bounds = Bounds(max_queue_size)
    rows = max(b for _, b in cost_table)
    scheduler = Scheduler(
        chosen,
        max_batch_size=rows,
        max_queue_delay_s=max_queue_delay_s,
        bounds=bounds,
        strict_shares=strict_shares,
    )
    _open_lanes(scheduler, chosen, run.weights, cost_table)
    rng = np.random.default_rng(seed)
    run.play(scheduler, (math.exp(noise * x) for x in _normals(rng, noise)))
    return run.result()


def _normals(rng: np.random.Generator, noise: float) -> Any:
    """Yield numbers of the standard normal distribution, or zeros if none is needed."""
    if not noise:
        return itertools.repeat(0.0)
    return (x for _ in itertools.count() for x in rng.standard_normal(4096).tolist())


def _check(trace: Arrivals, cost_table: Mapping[tuple[int, int], float]) -> None:
    if not any(slots == 1 for slots, _ in cost_table):
        raise ValueError(
            f"`simulate`: cost_table has {list(cost_table)}; it needs a bucket of one "
            f"slot, such as (1, 1)."
        )
    if not all(0 < step_s < math.inf for step_s in cost_table.values()):
        raise ValueError(
            f"`simulate`: found times {dict(cost_table)}; all must be > 0 and finite."
        )
    if len(trace.due_s) != len(trace.tenants) or (np.diff(trace.due_s) < 0).any():
        raise ValueError(
            "`simulate`: the trace's times and tenants must be as many, and the times "
            "ascending."
        )
    if not np.isfinite(trace.due_s).all():
        i = int(np.argmin(np.isfinite(trace.due_s)))
        raise ValueError(
            f"`simulate`: request {i} of the trace is due at {trace.due_s[i]} s; all "
            f"times must be finite."
        )


def _num_tenants(trace: Arrivals, asked: int | None) -> int:
    """Return N, as asked for or as many as the trace has."""
    tenants = np.asarray(trace.tenants)
    if len(tenants) and (tenants.dtype.kind not in "iu" or tenants.min() < 0):
        found = f"{tenants.min()} ({tenants.dtype})"
        raise ValueError(
            f"`simulate`: the trace has tenant {found}; pass whole numbers from 0."
        )
    least = int(tenants.max(initial=0)) + 1
    if asked is None:
        return least
    if not isinstance(asked, int | np.integer) or asked < least:
        raise ValueError(
            f"`simulate`: num_tenants is {asked!r}; the trace has tenants up to "
            f"{least - 1}: pass a whole number >= {least}, or None."
        )
    return int(asked)


def _check_options(
    num: int, weights: Sequence[float] | None, deadline_s: float | None
) -> None:
    if weights is not None and len(weights) != num:
        raise ValueError(
            f"`simulate`: found {len(weights)} weights for {num} tenants; pass one for "
            f"each, or None."
        )
    if weights is not None and not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"`simulate`: weights are {list(weights)}; all must be > 0 and finite."
        )
    if deadline_s is not None and math.isnan(deadline_s):
        raise ValueError(
            f"`simulate`: deadline_s is {deadline_s}; pass seconds, or None."
        )


def _open_lanes(
    scheduler: Scheduler,
    policy: Policy,
    weights: Sequence[float],
    cost_table: Mapping[tuple[int, int], float],
) -> None:
    names = [str(i) for i in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        scheduler.handle(Join(name, weight))
    if policy is Policy.SPACE_TIME:
        members: dict[str, tuple[int, ...]] = dict.fromkeys(names, (0,))
        # One more than there are: no bucket is dense, all slots are anybody's, as those
        # of an open bucket are.
        most = max(len(names), max(slots for slots, _ in cost_table)) + 1
        scheduler.handle(Install("all", (most,), members))
        for (slots, rows), step_s in cost_table.items():
            scheduler.handle(Ready("all", Bucket((slots,), rows), step_s))
        return
    for name in names:
        scheduler.handle(Install(name, (1,), {name: (0,)}))
        for (slots, rows), step_s in cost_table.items():
            if slots == 1:
                scheduler.handle(Ready(name, Bucket((1,), rows), step_s))


class _Run:
    """A trace on its way through the scheduler."""

    def __init__(
        self,
        trace: Arrivals,
        num_tenants: int,
        weights: Sequence[float] | None,
        deadline_s: float | None,
    ) -> None:
        self.trace = trace
        self.weights = [1.0] * num_tenants if weights is None else list(weights)
        self.deadline_s = deadline_s
        self.due_s = np.asarray(trace.due_s, float).tolist()
        self.owners = np.asarray(trace.tenants, int).tolist()
        self.names = [str(i) for i in range(num_tenants)]
        self.latency_s = [math.inf] * len(self.due_s)
        self.service_s = [0.0] * num_tenants
        self.fates = [0, 0, 0]
        self.in_flight: list[tuple[float, Any]] = []
        self.next = self.steps = self.seen = 0
        self.busy_s = self.now_s = self.free_s = 0.0

    def play(self, scheduler: Scheduler, noise: Any) -> None:
        """Run until every request has its fate."""
        while True:
            self._arrive(scheduler)
            wait_s = None
            num = len(self.in_flight)
            if not num or (num < _MAX_IN_FLIGHT and scheduler.has_backlog):
                decision = scheduler.decide(self.now_s)
                self.fates[_EXPIRED] += len(decision.expired)
                if decision.batch is not None:
                    self._launch(decision.batch, next(noise))
                    continue
                wait_s = decision.wait_until_s
            times = [t for t in (wait_s,) if t is not None and t > self.now_s]
            if self.next < len(self.due_s):
                times.append(self.due_s[self.next])
            if self.in_flight:
                times.append(self.in_flight[0][0])
            if not times:
                return
            self.now_s = max(self.now_s, min(times))
            while self.in_flight and self.in_flight[0][0] <= self.now_s:
                self._answer(*self.in_flight.pop(0))

    def _arrive(self, scheduler: Scheduler) -> None:
        """Submit what is due by now, at the time it was due."""
        due_s, owners, names = self.due_s, self.owners, self.names
        i, now_s, within_s = self.next, self.now_s, self.deadline_s
        while i < len(due_s) and due_s[i] <= now_s:
            at_s = due_s[i]
            until_s = None if within_s is None else at_s + within_s
            try:
                scheduler.handle(Submit(i, names[owners[i]], 1, at_s, until_s))
            except QueueFullError:
                self.fates[_REFUSED] += 1
            except DeadlineError:
                self.fates[_SHED] += 1
            i += 1
        self.next = i

    def _launch(self, batch: Any, noise: float) -> None:
        step_s = batch.predicted_s * noise
        self.free_s = max(self.free_s, self.now_s) + step_s
        self.busy_s += step_s
        self.steps += 1
        rows = sum(chunk.rows for chunk in batch.chunks)
        for chunk in batch.chunks:
            self.service_s[int(chunk.tenant)] += step_s * chunk.rows / rows
        self.seen += len({chunk.tenant for chunk in batch.chunks})
        self.in_flight.append((self.free_s, batch))

    def _answer(self, end_s: float, batch: Any) -> None:
        for chunk in batch.chunks:
            for request in chunk.requests:
                self.latency_s[request] = end_s - self.due_s[request]

    def result(self) -> Simulation:
        """Return what became of all."""
        return Simulation(
            latency_s=np.array(self.latency_s),
            tenants=np.asarray(self.trace.tenants),
            deadline_s=math.inf if self.deadline_s is None else self.deadline_s,
            refused=self.fates[_REFUSED],
            shed=self.fates[_SHED],
            expired=self.fates[_EXPIRED],
            service_s=np.array(self.service_s),
            weights=np.array(self.weights),
            steps=self.steps,
            tenants_per_step=self.seen / max(self.steps, 1),
            busy_s=self.busy_s,
            end_s=max(self.now_s, self.free_s),
        )
