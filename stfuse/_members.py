"""Who is in the engine, and in which lane; what becomes of those that leave.

What changes a lane runs on the device thread, between two steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any

from absl import logging

from stfuse import _lane
from stfuse._books import Books
from stfuse._cache import CostTable
from stfuse._errors import ClosedError, DeviceError
from stfuse._faults import Faults
from stfuse._flight import Tenant
from stfuse._lane import Lane, Member
from stfuse._memory import DoesNotFit
from stfuse._metrics import Metrics
from stfuse._residency import Residency, as_install
from stfuse._scheduler import Scheduler
from stfuse._types import Bucket, Device, Install, Leave, Ready

SHARED = "all"  # the lane of all jobs that fuse


class Members:
    """Tenants and lanes by name.

    Args:
        lock: the engine's.
        scheduler: serves them.
        books: their requests.
        metrics: their counts.
        faults: their quarantine.
        command: has something done on the device thread.
        device: where they are served.

    Attributes:
        costs: measured step times of every lane.
        residency: who waits for a slot.
        rebuild: has a lane built anew; the builder's.
    """

    def __init__(
        self,
        lock: threading.Condition,
        scheduler: Scheduler,
        books: Books,
        metrics: Metrics,
        faults: Faults,
        command: Callable[[Callable[[], Any]], Future[Any]],
        device: Device,
    ) -> None:
        """Start with nobody."""
        self.tenants: dict[str, Tenant] = {}
        self.lanes: dict[str, Lane] = {}
        self.costs = CostTable()
        self.rebuild: Callable[[str], None] = lambda lane: None
        self.residency = Residency(
            lock,
            scheduler,
            device,
            self.tenants,
            self.lanes,
            lambda lane: self.rebuild(lane),
        )
        self._lock = lock
        self._scheduler = scheduler
        self._books = books
        self._metrics = metrics
        self._faults = faults
        self._command = command

    def measured(
        self, lane: Lane, bucket: Bucket, step_s: float, host_s: float = 0.0
    ) -> list[Ready]:
        """Return what steps are predicted to take, now that one took so long.

        Nothing if the lane is no longer served: called on the device thread.
        """
        if self.lanes.get(lane.name) is not lane:
            return []
        key = (lane.name, lane.capacities, bucket)
        times = self.costs.record(key, step_s, host_s)
        found = {key: times, **self.costs.rested(lane.name)}
        return [
            Ready(lane.name, of, *times)
            for (_, capacities, of), times in found.items()
            if capacities == lane.capacities and of in lane.steps
        ]

    def fastest_s(self, lane: Lane, bucket: Bucket) -> float:
        """Return the least that a bucket's steps took lately; 0 if that is unknown."""
        return self.costs.fastest_s((lane.name, lane.capacities, bucket))

    def lose_lane(self, lane: Lane) -> None:
        """Stop serving a lane whose weights are spoilt; have it built anew."""
        logging.error("stfuse: lane '%s' lost its weights; it is built anew", lane.name)
        with self._lock:
            if self.lanes.get(lane.name) is not lane:
                return
            del self.lanes[lane.name]
            for tenant in self.tenants.values():
                if tenant.lane == lane.name:
                    tenant.is_placed = tenant.is_on_host = False
            self._scheduler.handle(Install(lane.name, (), {}))
        self.rebuild(lane.name)

    def refuse(self, tenant: Tenant, error: DeviceError) -> None:
        """Drop a tenant that cannot be served, and fail what it has waiting."""
        name = tenant.job.name
        with self._lock:
            tenant.is_leaving = True
            self._scheduler.handle(Leave(name))
        if not tenant.ready.done():
            tenant.ready.set_exception(error)
        self._books.fail_queued(error, [name])
        if not tenant.outstanding:
            self.depart(tenant)

    def join(self, lane: Lane, tenant: Tenant, staged: Member) -> None:
        """Give a tenant a free slot, on the device thread, if the lane has one for it.

        Args:
            lane: where; it may have been lost meanwhile.
            tenant: who.
            staged: the tenant with its weights on the device, if they are the newest.
        """
        if self.tenants.get(tenant.job.name) is not tenant:
            return  # it left, and its name may be another's by now
        is_newest = staged.generation == tenant.member.generation
        newest = staged if is_newest else tenant.member
        if self.lanes.get(lane.name) is lane and _lane.join(lane, newest):
            with self._lock:
                self._scheduler.handle(as_install(lane, keeps_ready=True))
            self.arrive(lane, [tenant])

    def arrive(self, lane: Lane, tenants: Sequence[Tenant]) -> None:
        """Let a lane be that of some tenants, on the device thread.

        Those without a slot of it wait on the host. What served them before is free.
        """
        left: dict[str, list[str]] = {}
        for tenant in tenants:
            has_slot = tenant.job.name in lane.places
            if tenant.is_placed and tenant.lane != lane.name:
                left.setdefault(tenant.lane, []).append(tenant.job.name)
            if not has_slot:
                self.residency.to_host(tenant)
            with self._lock:
                tenant.lane, tenant.home = lane.name, None
                tenant.is_placed, tenant.is_on_host = True, not has_slot
                if tenant.job.pinned or tenant.outstanding:
                    self.residency.want(tenant)
        for name, jobs in left.items():
            if name in self.lanes:
                self.vacate(self.lanes[name], jobs)

    def vacate(self, lane: Lane, jobs: Collection[str]) -> None:
        """Free jobs' slots on the device thread; a lane ends with its last job.

        All that leave at a time must be named at once: the scheduler takes those that
        a lane still lists to be the lane's.
        """
        for name in jobs:
            _lane.leave(lane, name)
        with self._lock:
            hosts = [
                t
                for t in self.tenants.values()
                if t.lane == lane.name and t.is_on_host and t.job.name not in jobs
            ]
            for tenant in hosts if not lane.places else ():
                self.residency.want(tenant)
            if lane.places:
                self._scheduler.handle(as_install(lane, keeps_ready=True))
            elif not hosts:
                del self.lanes[lane.name]
                self._scheduler.handle(Install(lane.name, (), {}))
        if lane.name not in self.lanes:
            self.costs.forget(lane.name)
            if lane.name != SHARED:
                self._metrics.forget_lane(lane.name)

    def depart(self, tenant: Tenant) -> None:
        """Free the slot of a tenant that has no requests left."""

        def free() -> None:
            if tenant.drained.done():
                return  # by now its name may be another's
            name, lane = tenant.job.name, self.lanes.get(tenant.lane)
            if lane is not None and tenant.is_placed:
                self.vacate(lane, [name])
            with self._lock:
                self.tenants.pop(name, None)
                for each in self.lanes.values():
                    each.known.pop(name, None)  # the next of this name is another one
                self._metrics.forget(name)
                self._faults.quarantine.release(name)
            closed = ClosedError("it was removed before this was done")
            for waiting in (tenant.ready, *tenant.swaps):
                if not waiting.done():
                    waiting.set_exception(closed.about(name))
            logging.info("stfuse: job '%s' left", name)
            tenant.drained.set_result(None)

        self._command(free)


def refusal(call: str, tenant: Tenant, error: Exception) -> DeviceError:
    """Return what a job gets whose step could not be built."""
    name = tenant.job.name
    reason = f"its step could not be built: {type(error).__name__}: {error}"
    if isinstance(error, DoesNotFit):
        reason = str(error)
    found = DeviceError(
        f"`stfuse.Engine.{call}`: job '{name}' was refused, {reason}", jobs=(name,)
    )
    found.__cause__ = error
    return found
