"""Brings lanes up, off the request path: group, pack, compile, measure, hand over.

Rules:
    A job joins a running lane without compiling when its program is there, a slot is
    free, and it has the shared leaves' values; else its lane is built anew beside the
    old one, which goes on serving until the new one's first bucket is compiled.
    The first bucket covers all others, so the lane serves at once, if not yet at full
    speed; a job is ready when all of them are compiled and measured.
    A build that fails refuses the jobs that it was for; the others notice nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from absl import logging

from stfuse import _cost, _lane
from stfuse._cache import buckets
from stfuse._errors import DeviceError, StfuseError
from stfuse._flight import Tenant
from stfuse._lane import Lane
from stfuse._server import Server
from stfuse._types import Bucket, Install, Policy


class Builder:
    """The builder thread's work.

    Args:
        server: whose lanes.
        policy: ``SPACE_TIME`` has one lane for all jobs, the others one each.
        max_batch_size: most rows of a slot.
        max_slots: most slots of a step.
    """

    def __init__(
        self, server: Server, policy: Policy, *, max_batch_size: int, max_slots: int
    ) -> None:
        """Start with nothing to build."""
        self._server = server
        self._policy = policy
        self._max_batch_size = max_batch_size
        self._max_slots = max_slots
        self._pending: list[str] = []
        self._one_at_a_time: set[str] = set()
        self._is_closed = False

    def lane_of(self, name: str) -> str:
        """Return the lane that a job belongs to."""
        return "all" if self._policy is Policy.SPACE_TIME else name

    def request(self, lane: str) -> None:
        """Ask for a lane to be brought up to date."""
        with self._server.lock:
            if lane not in self._pending:
                self._pending.append(lane)
            self._server.lock.notify_all()

    def is_pending(self, lane: str) -> bool:
        """Return whether a lane is still to be brought up to date."""
        return lane in self._pending

    def close(self) -> None:
        """Finish what waiting requests need, then stop."""
        with self._server.lock:
            self._is_closed = True
            self._server.lock.notify_all()

    def run(self) -> None:
        """Build what is asked for until closed: the builder thread."""
        server = self._server
        while True:
            with server.lock:
                while not self._pending and not self._is_closed:
                    server.lock.wait()
                if not self._pending:
                    return
                lane = self._pending.pop(0)
            self._update(lane)

    def _update(self, name: str) -> None:
        """Bring one lane up to date with its tenants."""
        self._server.faults.canary.prepare()  # does nothing if it is
        with self._server.lock:
            tenants = [t for t in self._server.tenants.values() if t.lane == name]
            new = [t for t in tenants if not t.is_placed]
        alone = [t for t in new if t.job.name in self._one_at_a_time]
        if alone:  # they failed together: find out which of them
            tenants = [t for t in tenants if t.is_placed or t is alone[0]]
            new = alone[:1]
            self._one_at_a_time.discard(new[0].job.name)
            self.request(name)
        if not tenants:
            return
        try:
            lane = self._join_all(name, tenants, new) or self._rebuild(name, tenants)
        except Exception as error:  # a compiler or a device may raise anything
            self._refuse(name, tenants, new, error)
        else:
            self._complete(lane, tenants)

    def _join_all(
        self, name: str, tenants: Sequence[Tenant], new: Sequence[Tenant]
    ) -> Lane | None:
        """Give new jobs free slots of the running lane; None if it must be rebuilt."""
        server = self._server

        def join() -> Lane | None:
            lane = server.lanes.get(name)
            if lane is None or any(t.swaps for t in tenants):
                return None
            joined = [t for t in new if _lane.join(lane, t.member)]
            with server.lock:
                for tenant in joined:
                    tenant.is_placed = True
                server.scheduler.handle(_install(lane, keeps_ready=True))
            return lane if len(joined) == len(new) else None

        return server.command(join).result()

    def _rebuild(self, name: str, tenants: Sequence[Tenant]) -> Lane:
        """Build a lane beside the running one, and let it serve instead."""
        while True:
            members = [t.member for t in tenants]
            cost = _cost.resolve("auto")
            lane = _lane.build(name, members, self._server.device, cost=cost)
            self._compile(lane, self._buckets(lane)[0])
            if self._server.command(lambda: self._hand_over(lane, tenants)).result():  # noqa: B023
                return lane

    def _hand_over(self, lane: Lane, tenants: Sequence[Tenant]) -> bool:
        """Let a built lane serve, on the device thread; False if it is out of date."""
        server = self._server
        for tenant in tenants:
            name, newest = tenant.job.name, tenant.member
            if server.tenants.get(name) is not tenant:
                _lane.leave(lane, name)
            elif lane.generations[name] != newest.generation:
                if not _lane.write(lane, newest):
                    return False  # swapped to weights that end a leaf's sharing
        first = next(iter(lane.steps))
        ready = server.measure(lane, first)  # it must run before it may serve
        with server.lock:
            if lane.places:
                server.lanes[lane.name] = lane
            for tenant in tenants:
                tenant.is_placed = tenant.job.name in lane.places
            server.scheduler.handle(_install(lane))
            server.scheduler.handle(ready)
        for tenant in tenants:
            _resolve_all(tenant.swaps)
        return True

    def _complete(self, lane: Lane, tenants: Sequence[Tenant]) -> None:
        """Compile what a serving lane still lacks, then call its jobs ready."""
        server = self._server
        for bucket in self._buckets(lane):
            if bucket in lane.steps:
                continue
            with server.lock:
                if self._is_closed or lane.name in self._pending:
                    return  # closing, or about to be brought up to date again
            try:
                self._compile(lane, bucket)
                server.command(lambda b=bucket: server.start(lane, b)).result()
            except Exception as error:  # the lane serves without this bucket
                lane.steps.pop(bucket, None)
                logging.error(
                    "stfuse: lane '%s' lacks %s: %s", lane.name, bucket, error
                )
        _resolve_all([t.ready for t in tenants])

    def _buckets(self, lane: Lane) -> list[Bucket]:
        return buckets(lane.capacities, self._max_slots, self._max_batch_size)

    def _compile(self, lane: Lane, bucket: Bucket) -> None:
        step = _lane.compile_bucket(
            lane, bucket, self._server.device, cost=_cost.resolve("auto")
        )
        lane.steps[bucket] = step

    def _refuse(
        self,
        name: str,
        tenants: Sequence[Tenant],
        new: Sequence[Tenant],
        error: Exception,
    ) -> None:
        """Refuse the jobs that a failed build was for."""
        for tenant in tenants:
            _resolve_all(tenant.swaps, _refusal("swap", tenant, error))
        if len(new) > 1:
            self._one_at_a_time.update(t.job.name for t in new)
            self.request(name)
            return
        for tenant in new:
            logging.error("stfuse: job '%s' refused: %s", tenant.job.name, error)
            self._server.refuse(tenant, _refusal("add", tenant, error))


def _refusal(call: str, tenant: Tenant, error: Exception) -> DeviceError:
    name = tenant.job.name
    refusal = DeviceError(
        f"`stfuse.Engine.{call}`: job '{name}' was refused, its step could not be "
        f"built: {type(error).__name__}: {error}",
        jobs=(name,),
    )
    refusal.__cause__ = error
    return refusal


def _install(lane: Lane, *, keeps_ready: bool = False) -> Install:
    members = {
        name: tuple(s for s, _ in places) for name, places in lane.places.items()
    }
    return Install(lane.name, lane.capacities, members, keeps_ready)


def _resolve_all(futures: list[Future[None]], error: StfuseError | None = None) -> None:
    """Resolve futures that still wait, and forget those of a list of swaps."""
    for future in futures:
        if future.done() or not future.set_running_or_notify_cancel():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
    futures.clear()
