"""Lanes like a full one, for more jobs of its programs: nothing is traced or compiled.

A lane whose banks have as many slots as a step may have would gain nothing by more of
them, and whatever is compiled beside others is in their way: a compiler tries its
kernels on the device that they are served by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from stfuse import _bank, _lane
from stfuse._flight import Tenant
from stfuse._lane import Lane
from stfuse._members import SHARED
from stfuse._memory import Memory, own_bytes
from stfuse._residency import as_install
from stfuse._server import Server

_MOMENT_S = 0.1  # steps that end after each other are less apart
_REST_S = 5e-3  # between the parts of a join, each about a millisecond


def is_busy(server: Server) -> bool:
    """Return whether a step was answered a moment ago."""
    return server.is_clock_real and server.clock() - server.read_s < _MOMENT_S


def _start(lane: Lane) -> str:
    """Return how the names of lanes like one begin; no job's name does."""
    return f"{lane.name}##"


class Siblings:
    """The lanes that are like the shared one.

    Args:
        server: whose lanes.
        memory: of its device.
        max_slots: most slots of a step.
        request: has a lane brought up to date.
    """

    def __init__(
        self,
        server: Server,
        memory: Memory,
        max_slots: int,
        request: Callable[[str], None],
    ) -> None:
        """Start with none."""
        self._server = server
        self._memory = memory
        self._max_slots = max_slots
        self._request = request
        self._num = 0
        self._prepared: list[Any] = []

    def prepare(self, lane: Lane) -> None:
        """Compile what a lane like this one needs, if there may be one."""
        if lane.name != SHARED or max(lane.capacities) < self._max_slots:
            return
        shapes = [(x.shape, x.dtype) for x in lane.bank.stacks]
        if shapes != self._prepared:  # to ask the compiler again takes a while too
            self._prepared = shapes
            try:
                _bank.expect_emptied(lane.layout, lane.bank)
            except Exception as error:  # a compiler's; that lane would say so
                logging.info("stfuse: no lane like '%s' yet: %s", lane.name, error)

    def needs(self, lane: Lane, tenant: Tenant) -> int | None:
        """Return the bytes that a job needs in a lane like a full one.

        Nothing if there is one with a free slot; None if the lane is not full.
        """
        species = _lane.species_of(lane, tenant.member)
        if lane.name != SHARED or not self._is_full(lane, species):
            return None
        has_room = any(_lane.has_room(o, tenant.member) for o in self._like(lane))
        return 0 if has_room else own_bytes(lane)

    def _like(self, lane: Lane) -> list[Lane]:
        """Return the lanes like a full one that there are."""
        lanes = [*self._server.lanes.values()]
        return [other for other in lanes if other.name.startswith(_start(lane))]

    def _is_full(self, lane: Lane, species: Sequence[int]) -> bool:
        """Return whether a lane has as many slots of some species as a step may."""
        return min(lane.capacities[s] for s in species) >= self._max_slots

    def take(self, lane: Lane, tenants: Sequence[Tenant]) -> None:
        """Give jobs a slot each of lanes like a full one, those that can be there.

        Not if the lane is not full, has not a job's programs or its shared leaves, or
        there is no memory for another one.

        Args:
            lane: the full one.
            tenants: whose jobs have no free slot there.
        """
        for tenant in tenants:
            if (name := self._take(lane, tenant)) is not None:
                self._request(name)

    def _take(self, lane: Lane, tenant: Tenant) -> str | None:
        """Return the name of the lane that serves a job now, None if there is none."""
        server = self._server
        keys = {trace.key for trace in lane.traces}
        if any(trace.key not in keys for trace in tenant.member.traces):
            return None
        if not self._is_full(lane, _lane.species_of(lane, tenant.member)):
            return None
        for other in self._like(lane):
            if _lane.has_room(other, tenant.member):
                staged = _lane.staged(other, tenant.member)
                join = server.members.join
                server.command(lambda: join(other, tenant, staged)).result()  # noqa: B023
                if tenant.is_placed and tenant.lane == other.name:
                    return other.name
        if not self._memory.fits(own_bytes(lane)):
            return None
        self._num += 1
        new = _lane.sibling(lane, f"{_start(lane)}{self._num}")
        self._rest()
        staged = _lane.staged(new, tenant.member)
        self._rest()
        # Written before it serves: nobody waits for that.
        if not _lane.join(new, staged):
            return None  # its shared leaves are others
        self._rest()
        is_open = server.command(lambda: self._open(new, tenant)).result()
        return new.name if is_open else None

    def _rest(self) -> None:
        """Let whoever is served catch up with what this thread did.

        To give way within each part, by looks at the clock, costs more than they do.
        """
        if is_busy(self._server):
            time.sleep(_REST_S)

    def _open(self, lane: Lane, tenant: Tenant) -> bool:
        """Let a new lane serve its first job, on the device thread."""
        server, name = self._server, tenant.job.name
        if server.tenants.get(name) is not tenant:
            return False  # it left
        is_newest = lane.generations[name] == tenant.member.generation
        if not (is_newest or _lane.write(lane, tenant.member)):
            return False  # it was swapped meanwhile, to other shared leaves
        with server.lock:
            server.lanes[lane.name] = lane
            server.scheduler.handle(as_install(lane))
        for bucket in lane.steps:
            server.start(lane, bucket)
        server.members.arrive(lane, [tenant])
        return True
