"""Tenants, what they have waiting, and how many wait for the same lane's steps.

No clock, no thread, no array, no JAX.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from typing import NamedTuple


class Entry(NamedTuple):
    """A queued request; a queue is sorted by these.

    Attributes:
        deadline_s: when it must have started; infinite for whenever.
        request: its number.
        rows: how many it has.
        arrival_s: when it came.
        length: which of its tenant's programs it is for.
        num_bytes: of its inputs.
    """

    deadline_s: float
    request: int
    rows: int
    arrival_s: float
    length: int = 0
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class Tenant:
    """A tenant and what it has waiting.

    Attributes:
        name: its name.
        weight: of its share.
        lane: who serves it; None while nobody does.
        species: by length, its program's place in the lane.
        is_leaving: whether it takes no more requests.
        queue: its requests, first to run first.
        rows: of all of them.
        num_bytes: of all of them.
        service_s: device seconds it got so far, over its weight.
        level_s: what most had when it began to wait, or was served last.
        since: after how many steps that was.
        began_s: what it had when it last began to wait and others had as much.
        turn: the step that served it last.
        is_parked: whether nothing that is ready could serve it.
        stamp: of its newest entry in a heap; 0 if it has none.
    """

    name: str
    weight: float
    lane: str | None = None
    species: tuple[int, ...] = (0,)
    is_leaving: bool = False
    queue: list[Entry] = field(default_factory=list)
    rows: int = 0
    num_bytes: int = 0
    service_s: float = 0.0
    level_s: float = 0.0
    since: int = 0
    began_s: float = 0.0
    turn: int = 0
    is_parked: bool = False
    stamp: int = 0


@dataclass(slots=True)
class _Line:
    """Who waits for steps of one lane.

    Attributes:
        num: tenants.
        heads: finite deadlines of their first requests, sorted.
    """

    num: int = 0
    heads: list[float] = field(default_factory=list)


class Lines:
    """How many tenants wait for each lane, and by which deadlines.

    A tenant's deadline is that of its first request, infinite for none.
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self._lines: dict[str | None, _Line] = {}

    def enter(self, lane: str | None, deadline_s: float) -> None:
        """Have one more tenant wait."""
        line = self._lines.setdefault(lane, _Line())
        line.num += 1
        if deadline_s < math.inf:
            bisect.insort(line.heads, deadline_s)

    def leave(self, lane: str | None, deadline_s: float) -> None:
        """Have one tenant less."""
        line = self._lines[lane]
        line.num -= 1
        if deadline_s < math.inf:
            del line.heads[bisect.bisect_left(line.heads, deadline_s)]
        if not line.num:
            del self._lines[lane]

    def change(self, lane: str | None, before_s: float, after_s: float) -> None:
        """Take note of a tenant's new deadline."""
        heads = self._lines[lane].heads
        if before_s < math.inf:
            del heads[bisect.bisect_left(heads, before_s)]
        if after_s < math.inf:
            bisect.insort(heads, after_s)

    def count(self, lane: str | None, deadline_s: float) -> tuple[int, int]:
        """Return how many wait, and how many of them for no later a deadline."""
        line = self._lines.get(lane)
        if line is None:
            return 0, 0
        return line.num, bisect.bisect_right(line.heads, deadline_s)
