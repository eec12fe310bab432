"""Lanes like a full one, for more jobs of its programs: nothing is traced or compiled.

A lane whose banks have as many slots as a step may have would gain nothing by more of
them, and whatever is compiled beside others is in their way. One with fewer slots is
built anew for more jobs; until then a lane like it serves them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging

from stfuse import _bank, _lane
from stfuse._flight import Tenant
from stfuse._lane import Lane
from stfuse._members import SHARED
from stfuse._memory import Memory, bank_bytes, own_bytes
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


def _has_programs(lane: Lane, tenant: Tenant) -> bool:
    """Return whether a lane computes all that a job does."""
    keys = {trace.key for trace in lane.traces}
    return all(trace.key in keys for trace in tenant.member.traces)


class Siblings:
    """The lanes that are like the shared one.

    Args:
        server: whose lanes.
        memory: of its device.
        max_slots: most slots of a step.
        request: has a lane brought up to date.
        new_lane: names a lane that is not the shared one's, for a job.

    Attributes:
        placing: held while jobs are given slots of lanes that are there.
    """

    def __init__(
        self,
        server: Server,
        memory: Memory,
        max_slots: int,
        request: Callable[[str], None],
        new_lane: Callable[[str], str],
    ) -> None:
        """Start with none."""
        self._server = server
        self._memory = memory
        self._max_slots = max_slots
        self._request = request
        self._new_lane = new_lane
        self._num = 0
        self._prepared: list[Any] = []
        self._held: set[str] = set()
        self.placing = threading.RLock()
        self._replaced: str | None = None

    @contextlib.contextmanager
    def replacing(
        self, name: str, tenants: Sequence[Tenant]
    ) -> Iterator[Sequence[Tenant]]:
        """Let nobody have a slot of a lane that is built anew while within.

        Args:
            name: the lane's.
            tenants: whom it is built for.

        Yields:
            Those, and who was given a slot of the old one meanwhile.
        """
        with self.placing, self._server.lock:
            self._replaced = name
            there = [t for t in self._server.tenants.values() if t.is_placed]
            there = [t for t in there if t.lane == t.wanted == name]
        try:
            yield [*tenants, *(t for t in there if t not in tenants)]
        finally:
            self._replaced = None
            self._memory.expect(None)

    def prepare(self, lane: Lane) -> None:
        """Compile what a lane like this one needs, if there may be one."""
        if lane.name != SHARED:
            return
        shapes = [(x.shape, x.dtype) for x in lane.bank.stacks]
        if shapes != self._prepared:  # to ask the compiler again takes a while too
            self._prepared = shapes
            try:
                _bank.expect_emptied(lane.layout, lane.bank)
            except Exception as error:  # a compiler's; that lane would say so
                logging.info("stfuse: no lane like '%s' yet: %s", lane.name, error)

    def waits_for_slot(self, lane: Lane, tenant: Tenant) -> bool:
        """Keep a job on the host if its lane cannot grow; return whether it is."""
        residency = self._server.members.residency
        if self._memory.limit_bytes is None or not residency.can_hold(lane, tenant):
            return False
        needed = self._needs(lane, tenant)
        if needed is None:
            species = _lane.species_of(lane, tenant.member)
            needed = bank_bytes(lane, doubled=species)
        if self._memory.fits(needed):
            return False
        arrive = self._server.members.arrive
        self._server.command(lambda: arrive(lane, [tenant])).result()
        return tenant.is_placed

    def _needs(self, lane: Lane, tenant: Tenant) -> int | None:
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
        with self.placing:
            for tenant in tenants:
                if (name := self._take(lane, tenant)) is not None:
                    self._request(name)

    def hold(self, lane: Lane, tenants: Sequence[Tenant]) -> list[Tenant]:
        """Serve jobs in lanes like one that is soon built anew for them.

        Args:
            lane: has too few slots.
            tenants: whose jobs.

        Returns:
            Those that cannot be there.
        """
        for tenant in tenants:
            try:
                with self.placing:
                    self._hold(lane, tenant)
            except Exception as error:  # a device may raise anything
                logging.info("stfuse: no lane like '%s': %s", lane.name, error)
        return [tenant for tenant in tenants if not tenant.is_placed]

    def place(self, lane: Lane, tenant: Tenant) -> None:
        """Serve a job in the shared lane, if it stays, or in one like it, if any can.

        Args:
            lane: the shared one.
            tenant: whose job has no lane.
        """
        if self._join(lane, tenant):
            return
        if (name := self._take(lane, tenant)) is None:
            self._hold(lane, tenant)
        else:
            self._request(name)

    def _hold(self, lane: Lane, tenant: Tenant) -> None:
        """Serve a job in a lane like one that is built anew, until that is there."""
        lanes = [*self._server.lanes.values()]
        self._held.intersection_update(other.name for other in lanes)
        others = [other for other in lanes if other.name in self._held]
        if not any(self._join(other, tenant) for other in others):
            self._open_held(lane, tenant)
        with self._server.lock:
            if tenant.is_placed and tenant.lane != SHARED:
                tenant.home = SHARED

    def _open_held(self, lane: Lane, tenant: Tenant) -> None:
        """Serve a job in a new lane, if one that grows has memory beside that."""
        grown = 0  # what is being built is counted
        if lane.name != self._replaced:
            grown = bank_bytes(lane, doubled=range(len(lane.capacities)))
        fits = self._memory.fits(2 * own_bytes(lane) + grown)  # and small lanes' own
        if fits and _has_programs(lane, tenant):
            name = self._new_lane(tenant.job.name)
            self._held.add(name)
            self._open_like(lane, name, tenant)

    def _take(self, lane: Lane, tenant: Tenant) -> str | None:
        """Return the name of the lane that serves a job now, None if there is none."""
        if not _has_programs(lane, tenant):
            return None
        if not self._is_full(lane, _lane.species_of(lane, tenant.member)):
            return None
        for other in self._like(lane):
            if self._join(other, tenant):
                return other.name
        if not self._memory.fits(own_bytes(lane)):
            return None
        self._num += 1
        name = f"{_start(lane)}{self._num}"
        return name if self._open_like(lane, name, tenant) else None

    def _join(self, lane: Lane, tenant: Tenant) -> bool:
        """Give a job a free slot of a lane; return whether it is there now."""
        if lane.name == self._replaced or not _lane.has_room(lane, tenant.member):
            return False
        staged = _lane.staged(lane, tenant.member)
        join = self._server.members.join
        self._server.command(lambda: join(lane, tenant, staged)).result()
        return tenant.is_placed and tenant.lane == lane.name

    def _open_like(self, lane: Lane, name: str, tenant: Tenant) -> bool:
        """Serve a job in a new lane like another one; return whether it is there."""
        new = _lane.sibling(lane, name)
        self.rest()
        staged = _lane.staged(new, tenant.member)
        self.rest()
        # Written before it serves: nobody waits for that.
        if not _lane.join(new, staged):
            return False  # its shared leaves are others
        self.rest()
        return self._server.command(lambda: self._open(new, tenant)).result()

    def rest(self, seconds: float = _REST_S) -> None:
        """Let whoever is served catch up with what this thread did.

        To give way within each part, by looks at the clock, costs more than they do.
        """
        if is_busy(self._server):
            time.sleep(seconds)

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
