"""Brings lanes up, off the request path: group, pack, compile, measure, hand over.

Rules:
    A job joins a running lane without compiling when its program is there, a slot is
    free, and it has the shared leaves' values; else its lane is built anew beside the
    old one, which goes on serving until the new one's first bucket is compiled.
    If that one is full, a lane like it takes the job, with nothing to compile.
    While others are served, any other new job does not wait for that: a lane like the
    shared one, or a small one of its own, serves it until the shared one takes it in.
    The first bucket covers all others, so the lane serves at once, if not yet at full
    speed; a job is ready when all of them are compiled and measured. A lane that takes
    over from another one first has what that one has, unless many wait for it.
    What does not fit into memory is not tried: slots are given in turns, a bucket is
    left out, a job stays in a lane of its own, or is refused, in this order.
    A build that fails refuses the jobs that it was for; the others notice nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

from absl import logging

from stfuse import _cost, _lane
from stfuse._answers import resolve_all
from stfuse._cache import buckets, covering
from stfuse._flight import Tenant
from stfuse._lane import Lane
from stfuse._members import SHARED, refusal
from stfuse._memory import DoesNotFit, Memory
from stfuse._newcomers import Newcomers
from stfuse._regroup import Regroup, fewer_slots, program
from stfuse._residency import as_install
from stfuse._server import Server
from stfuse._siblings import Siblings, is_busy
from stfuse._turns import QUICK_S, TURNS, giving_way
from stfuse._types import Bucket, Policy

_NUM_TIMINGS = 3
_REST_STEPS, _MOST_REST_S = 20, 0.25  # between them: others wait for each


class Builder:
    """The builder thread's work.

    Args:
        server: whose lanes.
        policy: ``SPACE_TIME`` has one lane for all jobs that fuse, the others one each.
        rows: of a slot that steps are compiled for, ascending.
        max_slots: most slots of a step.
        max_device_bytes: most bytes of the device's memory; None for all there are.
    """

    def __init__(
        self,
        server: Server,
        policy: Policy,
        *,
        rows: Sequence[int],
        max_slots: int,
        max_device_bytes: int | None = None,
    ) -> None:
        """Start with nothing to build."""
        self._server = server
        self._policy = policy
        self._rows = rows
        self._max_slots = max_slots
        self._memory = Memory(server.device, max_device_bytes, server.lanes.values)
        self._regroup = Regroup(server)
        of = self._memory, max_slots, self.request, self._regroup.new_lane
        self._siblings = own = Siblings(server, *of)
        is_evicted = self._regroup.is_evicted
        self.newcomers = Newcomers(server, own, self.request, is_evicted)
        self._pending: list[str] = []
        self._one_at_a_time: set[str] = set()
        self._stale: set[str] = set()  # lanes with species that nobody is in
        self._is_closed, self._many = False, 0  # requests that wait: as of `giving_way`
        server.observe = self._regroup.observe
        server.members.rebuild = self.request

    def lane_of(self, name: str) -> str:
        """Return the lane that a job belongs to."""
        return SHARED if self._policy is Policy.SPACE_TIME else name

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
        self.newcomers.close()

    def run(self) -> None:
        """Build what is asked for until closed: the builder thread."""
        server, regroup = self._server, self._regroup
        while True:
            self.newcomers.end()
            with server.lock:
                while not (self._pending or self._is_closed or regroup.is_due()):
                    server.lock.wait(regroup.wait_s())
                self._many = 2 * server.scheduler.num_queued + len(server.tenants)
                lane = self._pending.pop(0) if self._pending else None
                if lane is None and self._is_closed:
                    return
            if lane is not None:
                with TURNS.at_most(QUICK_S):  # tracing is Python, and others are served
                    self._update(lane)
                continue
            with self._siblings.placing:  # no newcomer gets into what is to be moved
                moves = regroup.moves()
            if regroup.to_measure is not None:
                (lane, bucket), regroup.to_measure = regroup.to_measure, None
                with server.lock:
                    self.newcomers.begin([])
                with TURNS.at_most(QUICK_S):
                    self._add_bucket(lane, bucket)
                with self._siblings.placing:
                    moves = regroup.moves()
            self._stale.update(moves[1:])  # what the first one is moved out of
            for name in moves:
                self.request(name)

    def _update(self, name: str) -> None:
        """Bring one lane up to date with its tenants."""
        self._server.faults.canary.prepare()  # does nothing if it is
        with self._siblings.placing, self._server.lock:
            tenants = [t for t in self._server.tenants.values() if t.wanted == name]
            new = [t for t in tenants if t.lane != name or not t.is_placed]
            self.newcomers.begin(new)
        if name == SHARED and (lanes := self._regroup.settle(new)):
            for lane in (*lanes, name):
                self.request(lane)
            return
        alone = [t for t in new if t.job.name in self._one_at_a_time]
        if alone:  # they failed together: find out which of them
            tenants = [t for t in tenants if t not in new or t is alone[0]]
            new = alone[:1]
            self._one_at_a_time.discard(new[0].job.name)
            self.request(name)
        if not tenants:
            self._stale.discard(name)
            return
        try:
            lane = self._bring_up(name, tenants, new)
        except Exception as error:  # a compiler or a device may raise anything
            self._refuse(name, tenants, new, error)
        else:
            self._complete(lane)

    def _bring_up(
        self, name: str, tenants: Sequence[Tenant], new: Sequence[Tenant]
    ) -> Lane:
        """Return the lane that serves the tenants now."""
        lane = self._join(name, tenants, new)
        if lane is not None:
            new = [t for t in new if t.lane != name or not t.is_placed]
            new = [t for t in new if not self._siblings.waits_for_slot(lane, t)]
            if not new and name not in self._stale:
                return lane
            if name == SHARED:
                self._siblings.take(lane, [t for t in new if not t.is_placed])
                here = {t for t in [*self._server.tenants.values()] if t.wanted == name}
                tenants, new = ([t for t in of if t in here] for of in (tenants, new))
                if not new and name not in self._stale:
                    return lane
        if name == SHARED and (shared := self._server.lanes.get(name)):
            self._serve_alone(shared, [t for t in new if not t.is_placed])
        lane = self._rebuild(name, tenants)
        self._stale.discard(name)
        return lane

    def _join(
        self, name: str, tenants: Sequence[Tenant], new: Sequence[Tenant]
    ) -> Lane | None:
        """Give new jobs free slots of the running lane, None if it must be rebuilt."""
        server, lane = self._server, self._server.lanes.get(name)
        for tenant in new:  # one by one: each has its weights on the device twice
            if lane is None or any(t.swaps for t in tenants):
                return None
            if _lane.has_room(lane, tenant.member):
                staged = _lane.staged(lane, tenant.member)
                join = partial(server.members.join, lane, tenant, staged)
                server.command(join).result()
            lane = server.lanes.get(name)
        return None if any(t.swaps for t in tenants) else lane

    def _serve_alone(self, shared: Lane, new: Sequence[Tenant]) -> None:
        """Serve new jobs in lanes like the shared one, or small ones, until it does."""
        of: dict[object, list[Tenant]] = {}
        for tenant in new:
            of.setdefault(program(tenant), []).append(tenant)
        for tenants in of.values():
            try:
                if left := self._siblings.hold(shared, tenants):
                    name = self._regroup.new_lane(left[0].job.name)
                    self._rebuild(name, left, is_small=True)
            except Exception as error:  # the shared lane may still take them
                logging.info("stfuse: no small lane was built: %s", error)
            with self._server.lock:
                for tenant in [t for t in tenants if t.is_placed]:
                    tenant.home = SHARED

    def _rebuild(
        self, name: str, tenants: Sequence[Tenant], *, is_small: bool = False
    ) -> Lane:
        """Build a lane beside the running one, and let it serve instead."""
        server, capacity = self._server, None
        with self._siblings.replacing(name, tenants) as tenants:
            while True:
                try:
                    lane = self._build(name, tenants, capacity, is_small=is_small)
                except DoesNotFit:
                    capacity = fewer_slots(tenants, capacity)
                    if capacity is None:
                        raise
                    continue
                self._catch_up(lane, tenants)
                for bucket in [b for b in lane.steps if b not in lane.step_s]:
                    self._measure(lane, bucket)  # each must run before it may serve
                if name == SHARED and self._is_refused(lane, tenants):
                    return server.lanes[name]
                if server.command(partial(self._hand_over, lane, tenants)).result():
                    return lane

    def _build(
        self,
        name: str,
        tenants: Sequence[Tenant],
        capacity: int | None,
        *,
        is_small: bool,
    ) -> Lane:
        """Return a lane that can serve all of its work, if not yet at full speed."""
        if capacity is not None:  # those that need a slot first, first
            tenants = sorted(
                tenants,
                key=lambda t: (not t.job.pinned, not t.outstanding, -t.last_request),
            )
        device, cost = self._server.device, _cost.resolve("auto")
        members, admit = [t.member for t in tenants], self._memory.promise
        with self._politely():
            lane = _lane.build(
                name, members, device, cost=cost, max_capacity=capacity, admit=admit
            )
        self._memory.expect(lane)
        found = self._buckets(lane)
        try:
            for bucket in covering(found, each=is_small):
                self._compile(lane, bucket)
        except DoesNotFit:
            if is_small:
                raise
            for bucket in covering(found, each=True):
                self._compile(lane, bucket)
        if self._policy is Policy.SPACE_TIME:
            # A write of each program, so that none has to be compiled while serving.
            with self._politely():
                for tenant in {program(t): t for t in tenants}.values():
                    _lane.write(lane, tenant.member)
        return lane

    def _catch_up(self, lane: Lane, tenants: Sequence[Tenant]) -> None:
        """Compile what a running lane has, unless many wait for the new one."""
        running = self._server.lanes.get(lane.name)
        is_urgent = lane.name in self._stale or any(t.swaps for t in tenants)
        is_urgent |= self._regroup.is_trial()
        num_new = sum(t.lane != lane.name for t in tenants)
        if running is None or is_urgent or 2 * num_new > len(tenants):
            return
        for bucket in self._buckets(lane):
            is_waited_for = self.newcomers.is_waited_for(lane.name)
            if self._is_closed or (self.is_pending(lane.name) and is_waited_for):
                return
            is_used = bucket in running.steps or bucket.is_open
            if is_used and bucket not in lane.steps:
                try:
                    self._compile(lane, bucket)
                    self._measure(lane, bucket)  # now, for all at once are a burst
                except Exception as error:  # `_complete` tries it again, and says so
                    lane.steps.pop(bucket, None)
                    logging.info("stfuse: '%s' lacks %s: %s", lane.name, bucket, error)

    def _is_refused(self, lane: Lane, tenants: Sequence[Tenant]) -> bool:
        """Measure a lane that takes evicted jobs back; return whether it does not."""
        is_refused = self._regroup.is_refused(lane, list(tenants))
        if is_refused:
            self.request(SHARED)  # for new jobs that the trial was to take in too
        return is_refused

    def _hand_over(self, lane: Lane, tenants: Sequence[Tenant]) -> bool:
        """Let a built lane serve, on the device thread; False if it is out of date."""
        server = self._server
        for tenant in tenants:
            name, newest = tenant.job.name, tenant.member
            if server.tenants.get(name) is not tenant:
                _lane.leave(lane, name)
            elif lane.generations.get(name) != newest.generation:
                if not _lane.write(lane, newest):
                    return False  # swapped to weights that end a leaf's sharing
        here = [t for t in tenants if server.tenants.get(t.job.name) is t]
        with server.lock:
            if lane.places:
                server.lanes[lane.name] = lane
            server.scheduler.handle(as_install(lane))
        for bucket in lane.steps:
            server.start(lane, bucket)
        server.members.arrive(lane, here)
        for tenant in tenants:
            resolve_all(tenant.swaps)
        return True

    def _complete(self, lane: Lane) -> None:
        """Compile what a serving lane still lacks, then call its jobs ready."""
        server = self._server
        for bucket in [b for b in self._buckets(lane) if b not in lane.steps]:
            with server.lock:
                if self._is_closed or lane.name in self._pending:
                    return  # closing, or about to be brought up to date again
            self._add_bucket(lane, bucket)
        self._siblings.prepare(lane)
        with server.lock:
            here = [t for t in server.tenants.values() if t.lane == lane.name]
            done = [t for t in here if t.is_placed and not (t.home or t.ready.done())]
        for tenant in done:
            logging.info("stfuse: job '%s' ready", tenant.job.name)
        resolve_all([tenant.ready for tenant in done])

    def _add_bucket(self, lane: Lane, bucket: Bucket) -> None:
        """Compile one more bucket of a serving lane, which can do without it."""
        try:
            self._compile(lane, bucket)
            self._measure(lane, bucket)
            self._server.command(lambda: self._server.start(lane, bucket)).result()
        except Exception as error:
            lane.steps.pop(bucket, None)
            level = logging.INFO if bucket.is_open else logging.ERROR
            what = "stfuse: lane '%s' lacks %s: %s"
            logging.log(level, what, lane.name, bucket, error)

    def _measure(self, lane: Lane, bucket: Bucket) -> None:
        for _ in range(_NUM_TIMINGS):
            measure = partial(self._server.measure, lane, bucket)
            step_s = self._server.command(measure).result()
            self._siblings.rest(min(_REST_STEPS * step_s, _MOST_REST_S))

    def _buckets(self, lane: Lane) -> list[Bucket]:
        return buckets(lane.capacities, self._max_slots, self._rows)

    def _politely(self) -> AbstractContextManager[None]:
        """Give way while anybody waits, if anybody is served."""
        server, many = self._server, self._many
        return giving_way(is_busy(server), lambda: server.scheduler.num_queued, many)

    def _compile(self, lane: Lane, bucket: Bucket) -> None:
        of, cost = (lane, bucket, self._server.device), _cost.resolve("auto")
        with self._politely():
            step = _lane.compile_bucket(*of, cost=cost, is_beside=is_busy(self._server))
        self._memory.admit(lane, bucket, step)
        lane.steps[bucket] = step

    def _refuse(
        self,
        name: str,
        tenants: Sequence[Tenant],
        new: Sequence[Tenant],
        error: Exception,
    ) -> None:
        """Refuse the jobs that a failed build was for, if nothing else serves them."""
        self._regroup.give_up()
        self._stale.discard(name)
        for tenant in tenants:
            resolve_all(tenant.swaps, refusal("swap", tenant, error))
        new = [t for t in new if t.wanted == name != t.lane or not t.is_placed]
        if len(new) > 1:
            self._one_at_a_time.update(t.job.name for t in new)
            self.request(name)
            return
        for tenant in new:
            logging.error("stfuse: job '%s' refused: %s", tenant.job.name, error)
            if tenant.is_placed:  # it gets a lane of its own, with all its buckets
                tenant.home = None
                self._stale.add(tenant.lane)
                self.request(tenant.lane)
            else:
                self._server.members.refuse(tenant, refusal("add", tenant, error))
        self._server.command(partial(self.request, name))  # others' readiness waited
