"""One step on its way: who is in it, its answers, and what to do if it fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import jax

from stfuse._answers import Answer
from stfuse._inputs import Form
from stfuse._job import Job
from stfuse._lane import Lane, Member
from stfuse._lengths import Shapes
from stfuse._stacked import resized
from stfuse._staging import Staged, cut_leaves, cut_places, memory_of
from stfuse._types import Batch, StepRecord


@dataclass(slots=True, eq=False)
class Tenant:
    """A job in the engine.

    Attributes:
        job: the job.
        member: its program and newest weights.
        lane: name of the lane that serves it, or will.
        home: name of the lane that it is on its way to; None if it is there.
        ready: resolves when its lane runs at full speed.
        swaps: resolve when a lane holds ``member``'s weights.
        is_placed: whether a lane holds it.
        is_on_host: whether its weights wait on the host for a slot of the lane.
        is_leaving: whether it takes no more requests.
        outstanding: requests not yet answered.
        drained: resolves when it left.
        last_request: number of its newest request.
        slot_since: grows with every slot that is given away.
        form: what its requests look like.
        outputs: structure of its answers; None for a single array.
    """

    job: Job
    member: Member
    lane: str
    ready: Future[None] = field(default_factory=Future)
    home: str | None = None
    swaps: list[Future[None]] = field(default_factory=list)
    is_placed: bool = False
    is_on_host: bool = False
    is_leaving: bool = False
    outstanding: int = 0
    drained: Future[None] = field(default_factory=Future)
    last_request: int = 0
    slot_since: int = 0
    form: Form = field(init=False)
    outputs: Any = field(init=False)

    @property
    def wanted(self) -> str:
        """Name of the lane that it belongs to, there already or not."""
        return self.home or self.lane

    def __post_init__(self) -> None:
        """Work out once what every request would ask for."""
        self.form = Form(self.job)
        structure = jax.tree.structure(self.job.outputs)
        self.outputs = None if structure == jax.tree.structure(0) else structure


@dataclass(slots=True, eq=False)  # not frozen: that would double the time to build one
class Request:
    """A request and where its answer goes.

    Attributes:
        tenant: whose it is.
        leaves: the bytes of its input leaves ``[B, ...]``.
        rows: B.
        submitted_s: when it arrived.
        deadline_s: when it must have started, on the same clock, or None.
        future: of its outputs.
        length: which of the job's programs it is for.
        out_sizes: shapes that its outputs are cut back to, or None.
        is_started: whether its owner was told that it runs, or that it will not.
    """

    tenant: Tenant
    leaves: Sequence[bytes]
    rows: int
    submitted_s: float
    deadline_s: float | None
    future: Answer
    length: int = 0
    out_sizes: Shapes | None = None
    is_started: bool = False


@dataclass(slots=True, eq=False)
class Flight:
    """A step that was launched.

    Attributes:
        lane: what ran.
        batch: who is in it.
        requests: its requests by number.
        staged: its host buffers, in use until it was read.
        placed: species and slot of each chunk.
        outputs: its outputs on the device.
        launched_s: when it was launched.
        host_s: host seconds that choosing it, filling its buffers, launching it took.
    """

    lane: Lane
    batch: Batch
    requests: Mapping[int, Request]
    staged: Staged
    placed: list[tuple[int, int]]
    outputs: Any
    launched_s: float
    host_s: tuple[float, float, float]


def answers(flight: Flight, outputs: Any) -> list[tuple[int, Any]]:
    """Return each request's number and its own outputs.

    Args:
        flight: the step.
        outputs: what it computed, on the host.
    """
    found = []
    memory = memory_of(outputs)
    lane, bucket = flight.lane, flight.batch.bucket
    places_of = [
        cut_places(lane, bucket, s) if k else () for s, k in enumerate(bucket.slots)
    ]
    for chunk, (s, k) in zip(flight.batch.chunks, flight.placed, strict=True):
        start = 0
        for number in chunk.requests:
            request = flight.requests[number]
            at = places_of[s]
            if request.out_sizes is not None:
                at = resized(at, request.out_sizes)
            rows = request.rows if request.tenant.job.batched else None
            leaves = cut_leaves(memory, at, k, start, rows)
            structure = request.tenant.outputs
            own = leaves[0] if structure is None else structure.unflatten(leaves)
            found.append((number, own))
            start += request.rows
    return found


def record(flight: Flight, now_s: float, step_s: float) -> StepRecord:
    """Return what a step did, for the metrics."""
    rows: dict[str, int] = {}
    latencies_s: dict[str, list[float]] = {}
    late: dict[str, int] = {}
    for chunk in flight.batch.chunks:
        name = chunk.tenant
        rows[name] = rows.get(name, 0) + chunk.rows
        waited = latencies_s.setdefault(name, [])
        for number in chunk.requests:
            request = flight.requests[number]
            waited.append(now_s - request.submitted_s)
            if request.deadline_s is not None and now_s > request.deadline_s:
                late[name] = late.get(name, 0) + 1
    return StepRecord(
        lane=flight.lane.name,
        bucket=flight.batch.bucket,
        step_s=step_s,
        predicted_s=flight.batch.predicted_s,
        rows=rows,
        latencies_s=latencies_s,
        late=late,
    )


def only(batch: Batch, wanted: Iterable[int], requests: Mapping[int, Request]) -> Batch:
    """Return a batch with some of its requests."""
    wanted = set(wanted)
    chunks = tuple(
        c._replace(requests=kept, rows=sum(requests[n].rows for n in kept))
        for c in batch.chunks
        if (kept := tuple(n for n in c.requests if n in wanted))
    )
    return Batch(batch.lane, batch.bucket, chunks, batch.predicted_s)


def is_served(batch: Batch, lane: Lane | None) -> bool:
    """Return whether a lane can run a step that was meant for it some time ago."""
    if lane is None or batch.bucket not in lane.steps:
        return False
    left = list(batch.bucket.slots)
    for chunk in batch.chunks:
        places = lane.places.get(chunk.tenant)
        if places is None:
            return False
        left[places[chunk.length][0]] -= 1
    return min(left) >= 0


def rehomed(batch: Batch, lanes: Iterable[Lane]) -> list[Batch]:
    """Return a step as one for each chunk, in lanes that serve its tenants now.

    A step that is run again may find that they moved. Those that no lane serves are
    left out.
    """
    found = []
    for chunk in batch.chunks:
        for lane in lanes:
            places = lane.places.get(chunk.tenant)
            if places is None:
                continue
            s, _ = places[chunk.length]
            for bucket in lane.steps:
                if bucket.slots[s] and bucket.rows >= chunk.rows:
                    moved = chunk._replace(species=s)
                    found.append(Batch(lane.name, bucket, (moved,), batch.predicted_s))
                    break
            break
    return found


def halves(batch: Batch, requests: Mapping[int, Request]) -> tuple[Batch, ...]:
    """Return a failed batch as two, to find the request that breaks it."""
    numbers = [n for chunk in batch.chunks for n in chunk.requests]
    middle = len(numbers) // 2
    return tuple(
        only(batch, part, requests) for part in (numbers[:middle], numbers[middle:])
    )
