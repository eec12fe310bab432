"""Which tenants of a lane have a slot, when it has more tenants than slots.

Rules:
    The weights of a tenant without a slot live on the host. Its requests are queued,
    and ask for a slot at once: its weights travel while other steps run.
    First come, first served: it gets a free slot, else that of the tenant whose last
    request is the longest ago, among those with nothing queued or in flight.
    Nobody waits for ever: after `patience` steps it gets the slot of the tenant that
    has had one the longest, as soon as nothing is in flight; what that one has queued
    waits for its next turn.
    A pinned tenant keeps its slot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from stfuse import _lane
from stfuse._flight import Tenant
from stfuse._lane import Lane
from stfuse._scheduler import Scheduler
from stfuse._types import Device, Install


@dataclass(frozen=True, slots=True)
class Move:
    """A tenant that gets a slot, and the one that gives it up, if any."""

    lane: Lane
    newcomer: Tenant
    victim: Tenant | None


class Residency:
    """Who waits for a slot.

    Args:
        lock: the engine's.
        scheduler: serves only those that have one.
        device: whose host memory is the nearest.
        tenants: by name.
        lanes: by name.
        rebuild: has a lane brought up to date.
        patience: steps that a tenant waits before it takes the slot of a busy one.
    """

    def __init__(
        self,
        lock: threading.Condition,
        scheduler: Scheduler,
        device: Device,
        tenants: dict[str, Tenant],
        lanes: dict[str, Lane],
        rebuild: Callable[[str], None],
        *,
        patience: int = 64,
    ) -> None:
        """Start with nobody waiting."""
        self.waiting: dict[str, int] = {}  # by name: the step at which it began
        self.needs_quiet = False
        self.num_moves = 0
        self._num_steps = 0
        self._rebuild = rebuild
        self._lock = lock
        self._scheduler = scheduler
        self._device = device
        self._tenants = tenants
        self._lanes = lanes
        self._patience = patience

    def want(self, tenant: Tenant) -> None:
        """Ask for a slot, if the tenant has none; the lock is held."""
        if tenant.is_on_host:
            self.waiting.setdefault(tenant.job.name, self._num_steps)

    def choose(self, num_steps: int, is_quiet: bool) -> Move | None:
        """Return the next move, if one is possible now; the lock is held.

        Args:
            num_steps: steps that ran so far.
            is_quiet: whether nothing is in flight.
        """
        self._num_steps, self.needs_quiet = num_steps, False
        for name, since in list(self.waiting.items()):
            tenant = self._tenants.get(name)
            lane = self._lanes.get(tenant.lane) if tenant is not None else None
            if tenant is None or lane is None or not tenant.is_on_host:
                del self.waiting[name]
                continue
            of = _lane.species_of(lane, tenant.member)
            if all(_lane.free_slot(lane, s) is not None for s in of):
                return Move(lane, tenant, None)
            loose = [t for t in self._mates(lane, of) if not t.job.pinned]
            idle = [t for t in loose if not t.outstanding]
            if idle:
                return Move(lane, tenant, min(idle, key=lambda t: t.last_request))
            if loose and num_steps - since >= self._patience:
                if is_quiet:
                    return Move(lane, tenant, min(loose, key=lambda t: t.slot_since))
                self.needs_quiet = True
        return None

    def carry_out(self, move: Move) -> None:
        """Write the newcomer's weights into its slot, on the device thread."""
        lane, tenant, victim = move.lane, move.newcomer, move.victim
        with self._lock:
            self.waiting.pop(tenant.job.name, None)
        if not _lane.knows(lane, tenant.member):
            with self._lock:  # it was swapped to weights that end a leaf's sharing
                tenant.is_on_host = tenant.is_placed = False
            self._rebuild(lane.name)
            return
        if victim is not None:
            _lane.leave(lane, victim.job.name, is_coming_back=True)
            self.to_host(victim)
        _lane.join(lane, tenant.member)
        with self._lock:
            if victim is not None and victim.outstanding:
                self.want(victim)
            tenant.is_on_host = False
            self.num_moves += 1
            tenant.slot_since = self.num_moves
            self._scheduler.handle(as_install(lane, keeps_ready=True))

    def to_host(self, tenant: Tenant) -> None:
        """Let a tenant's weights live on the host; it has no slot any more."""
        put = getattr(self._device, "put_on_host", tuple)
        with self._lock:
            tenant.is_on_host = True
            tenant.member = replace(tenant.member, params=put(tenant.member.params))

    def can_hold(self, lane: Lane, tenant: Tenant) -> bool:
        """Return whether a lane can take a tenant that has no slot of its own yet."""
        if not _lane.knows(lane, tenant.member):
            return False
        of = _lane.species_of(lane, tenant.member)
        waiting = [
            t
            for t in [*self._tenants.values()]  # others come and go meanwhile
            if t.lane == lane.name and t.is_on_host
        ]
        pinned = [t for t in (*self._mates(lane, of), *waiting) if t.job.pinned]
        return len(pinned) + tenant.job.pinned < min(lane.capacities[s] for s in of)

    def _mates(self, lane: Lane, species: tuple[int, ...]) -> list[Tenant]:
        """Return the tenants that have slots of the same species."""
        return [
            self._tenants[name]
            for name, places in [*lane.places.items()]
            if tuple(s for s, _ in places) == species and name in self._tenants
        ]


def as_install(lane: Lane, *, keeps_ready: bool = False) -> Install:
    """Return the event that tells the scheduler whom a lane serves now."""
    members = {
        name: tuple(s for s, _ in places) for name, places in lane.places.items()
    }
    return Install(lane.name, lane.capacities, members, keeps_ready)
