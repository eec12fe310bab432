"""One step on its way: who is in it, its answers, and what to do if it fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from stfuse._job import Job
from stfuse._lane import Lane, Member, cut_places
from stfuse._lengths import Shapes
from stfuse._stacked import cut, resized
from stfuse._types import Batch, StepRecord


@dataclass(slots=True)
class Tenant:
    """A job in the engine.

    Attributes:
        job: the job.
        member: its program and newest weights.
        lane: name of the lane that serves it, or will.
        ready: resolves when its lane runs at full speed.
        swaps: resolve when a lane holds ``member``'s weights.
        is_placed: whether a lane holds it.
        is_leaving: whether it takes no more requests.
        outstanding: requests not yet answered.
        drained: resolves when it left.
    """

    job: Job
    member: Member
    lane: str
    ready: Future[None] = field(default_factory=Future)
    swaps: list[Future[None]] = field(default_factory=list)
    is_placed: bool = False
    is_leaving: bool = False
    outstanding: int = 0
    drained: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Request:
    """A request and where its answer goes.

    Attributes:
        tenant: whose it is.
        leaves: its input leaves ``[B, ...]``, the engine's own copies.
        rows: B.
        submitted_s: when it arrived.
        deadline_s: when it must have started, on the same clock, or None.
        future: of its outputs.
        length: which of the job's programs it is for.
        out_sizes: shapes that its outputs are cut back to, or None.
    """

    tenant: Tenant
    leaves: Sequence[Any]
    rows: int
    submitted_s: float
    deadline_s: float | None
    future: Future[Any]
    length: int = 0
    out_sizes: Shapes | None = None


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched.

    Attributes:
        lane: what ran.
        batch: who is in it.
        staged: its host buffers, in use until it was read.
        placed: species and slot of each chunk.
        outputs: its outputs on the device.
        launched_s: when it was launched.
    """

    lane: Lane
    batch: Batch
    staged: tuple[Any, Any]
    placed: list[tuple[int, int]]
    outputs: Any
    launched_s: float


def answers(
    flight: Flight, outputs: Any, requests: Mapping[int, Request]
) -> list[tuple[int, Any]]:
    """Return each request's number and its own outputs.

    Args:
        flight: the step.
        outputs: what it computed, on the host.
        requests: by number.
    """
    found = []
    for chunk, (s, k) in zip(flight.batch.chunks, flight.placed, strict=True):
        start = 0
        places = cut_places(flight.lane, flight.batch.bucket, s)
        for number in chunk.requests:
            request = requests[number]
            rows, job = request.rows, request.tenant.job
            at = resized(places, request.out_sizes)
            own = cut(outputs, at, k, start, rows, job)
            found.append((number, own))
            start += request.rows
    return found


def record(
    flight: Flight, requests: Mapping[int, Request], now_s: float, step_s: float
) -> StepRecord:
    """Return what a step did, for the metrics."""
    rows: dict[str, int] = {}
    latencies_s: dict[str, list[float]] = {}
    late: dict[str, int] = {}
    for chunk in flight.batch.chunks:
        name = chunk.tenant
        rows[name] = rows.get(name, 0) + chunk.rows
        of = [requests[number] for number in chunk.requests]
        latencies_s.setdefault(name, []).extend(now_s - r.submitted_s for r in of)
        num_late = sum(r.deadline_s is not None and now_s > r.deadline_s for r in of)
        late[name] = late.get(name, 0) + num_late
    return StepRecord(
        lane=flight.lane.name,
        bucket=flight.batch.bucket,
        step_s=step_s,
        predicted_s=flight.batch.predicted_s,
        rows=rows,
        latencies_s={name: tuple(each) for name, each in latencies_s.items()},
        late=late,
    )


def only(batch: Batch, wanted: Iterable[int], requests: Mapping[int, Request]) -> Batch:
    """Return a batch with some of its requests."""
    wanted = set(wanted)
    chunks = tuple(
        replace(c, requests=kept, rows=sum(requests[n].rows for n in kept))
        for c in batch.chunks
        if (kept := tuple(n for n in c.requests if n in wanted))
    )
    return Batch(batch.lane, batch.bucket, chunks, batch.predicted_s)


def halves(batch: Batch, requests: Mapping[int, Request]) -> tuple[Batch, ...]:
    """Return a failed batch as two, to find the request that breaks it."""
    numbers = [n for chunk in batch.chunks for n in chunk.requests]
    middle = len(numbers) // 2
    return tuple(
        only(batch, part, requests) for part in (numbers[:middle], numbers[middle:])
    )
