"""Jobs that come, and are asked, while the builder is at something that takes long.

They get what takes a moment: a free slot, or a lane like the shared one. Whoever finds
neither waits for the builder, which settles all of them in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from absl import logging

from stfuse._flight import Tenant
from stfuse._members import SHARED
from stfuse._server import Server
from stfuse._siblings import Siblings

_LOOK_S = 0.05  # between two looks at whether any of those that wait was asked


class Newcomers:
    """The work of a thread beside the builder's.

    Args:
        server: whose tenants.
        siblings: the lanes like the shared one.
        request: has a lane brought up to date by the builder.
        is_evicted: whether a job's program has a lane of its own.
    """

    def __init__(
        self,
        server: Server,
        siblings: Siblings,
        request: Callable[[str], None],
        is_evicted: Callable[[Tenant], bool],
    ) -> None:
        """Start with nobody."""
        self._server = server
        self._siblings = siblings
        self._request = request
        self._is_evicted = is_evicted
        self._builders: set[Tenant] | None = None  # None while the builder is idle
        self._tried: set[Tenant] = set()  # since it began what it is at
        self._is_closed = False

    def begin(self, tenants: Iterable[Tenant]) -> None:
        """Take note of what the builder begins, and for whom; the lock is held."""
        self._builders, self._tried = {*tenants}, set()
        self._server.lock.notify_all()

    def end(self) -> None:
        """Take note that the builder is idle."""
        with self._server.lock:
            self._builders, self._tried = None, set()

    def is_waited_for(self, lane: str) -> bool:
        """Return whether somebody waits until a lane is brought up to date."""
        there = [t for t in [*self._server.tenants.values()] if t.wanted == lane]
        return any(t.swaps or not t.is_placed for t in there)

    def close(self) -> None:
        """Let `run` return."""
        with self._server.lock:
            self._is_closed = True
            self._server.lock.notify_all()

    def run(self) -> None:
        """Place jobs until closed: the thread of newcomers."""
        while self._place_next():
            self._request(SHARED)  # it settles all of them

    def _place_next(self) -> bool:
        """Wait for a job and try to place it; return whether there was one."""
        tenant = self._next()
        if tenant is None:
            return False
        try:
            self._place(tenant)
        except Exception as error:  # a device may raise anything
            logging.info("stfuse: job '%s' waits: %s", tenant.job.name, error)
        return True

    def _next(self) -> Tenant | None:
        """Wait for a job that is to be placed; None for the end."""
        with self._server.lock:
            while not self._is_closed:
                waiting = self._waiting()
                found = next((t for t in waiting if t.outstanding), None)
                if found is not None:
                    self._tried.add(found)
                    return found
                self._server.lock.wait(_LOOK_S if waiting else None)
        return None

    def _waiting(self) -> list[Tenant]:
        """Return who has no lane, and is none of those that the builder is at."""
        if self._builders is None:
            return []
        left_alone = self._builders | self._tried
        tenants = [t for t in self._server.tenants.values() if not t.is_placed]
        return [t for t in tenants if t.wanted == SHARED and t not in left_alone]

    def _place(self, tenant: Tenant) -> None:
        """Give a job a slot of a lane that is there, or of one like the shared one."""
        with self._siblings.placing:
            with self._server.lock:
                if tenant.is_placed or tenant in (self._builders or ()):
                    return  # the builder came first
            shared = self._server.lanes.get(SHARED)
            if shared is not None and not self._is_evicted(tenant):
                self._siblings.place(shared, tenant)
