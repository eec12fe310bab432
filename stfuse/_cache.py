"""Signature to compiled step; buckets; measured step times.

A signature holds shapes and structure only, never a job's name or identity: tenants
that come and go, and engines of other policies, share what was compiled once.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import jax

from stfuse._types import Bucket

_FROM = 8  # slots; below, half of them, which are open, are nearly as good


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def powers_of_two(limit: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and ``limit`` itself, ascending."""
    below = [1 << i for i in range(limit.bit_length()) if 1 << i < limit]
    return (*below, limit)


def buckets(
    capacities: Sequence[int], max_slots: int, rows: Sequence[int]
) -> list[Bucket]:
    """Return the shapes that a lane is compiled for.

    Every species alone at one slot and at all (nobody pays for a species that has
    nothing to do), and all species together at 1, 2, 4, ... slots each, bounded by
    their capacity; each at each number of rows. All slots of a lone species also open,
    if they are many: in the largest step those who have more waiting than others should
    not be held to a slot each. The first one covers the most species, then slots: all
    work can run in it until the others are ready, but for species beyond ``max_slots``.

    Args:
        capacities: slots of each species' bank.
        max_slots: most slots of one step, over all species.
        rows: of a slot, ascending.

    Example:
        >>> [str(b) for b in buckets((2, 1), 64, [1])]
        ['2+1x1', '0+1x1', '1+0x1', '1+1x1', '2+0x1']
    """
    shapes = set()
    for i in range(len(capacities)):
        for k in (1, min(capacities[i], max_slots)):
            shapes.add(tuple(k * (i == j) for j in range(len(capacities))))
    for k in powers_of_two(max(capacities)):
        together = tuple(min(k, c) for c in capacities)
        if sum(together) <= max_slots:
            shapes.add(together)
    found = sorted(Bucket(slots, b) for slots in shapes for b in rows)
    largest = max(found, key=lambda b: (sum(map(bool, b.slots)), sum(b.slots), b.rows))
    if len(capacities) == 1 and _FROM <= sum(capacities) <= max_slots:
        found += [Bucket(tuple(capacities), b, is_open=True) for b in rows]
    return [largest, *(b for b in found if b != largest)]


def covering(found: Sequence[Bucket], *, each: bool) -> list[Bucket]:
    """Return the few of a lane's buckets that all of its work can run in.

    Args:
        found: from `buckets`.
        each: whether they are the smallest steps, a slot of one species each; else the
            first bucket, and those of the species that it has no slot of.
    """
    rows = max(bucket.rows for bucket in found)
    alone = [b for b in found if sum(b.slots) == 1 and b.rows == rows]
    first = found[0]
    if each:
        return alone
    return [first, *(b for b in alone if not first.slots[b.slots.index(1)])]


class StepCache:
    """Bounded memory of compiled steps; concurrent callers compile a signature once."""

    def __init__(self, max_entries: int = 512) -> None:
        """Start empty; the least recently used entry leaves first."""
        self._max_entries = max_entries
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Future[Any]] = OrderedDict()
        self.num_compiles = 0

    def get(self, signature: Hashable, build_fn: Callable[[], Any]) -> Any:
        """Return the compiled step of a signature, building it if it is new.

        Args:
            signature: shapes, structure, device and options.
            build_fn: traces and compiles; may raise, and is then tried anew next time.

        Returns:
            What ``build_fn`` returned.
        """
        with self._lock:
            entry = self._entries.get(signature)
            is_mine = entry is None
            if entry is None:
                entry = self._entries[signature] = Future()
            self._entries.move_to_end(signature)
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
        if is_mine:
            try:
                entry.set_result(build_fn())
                with self._lock:
                    self.num_compiles += 1
            except BaseException as error:
                with self._lock:
                    self._entries.pop(signature, None)
                entry.set_exception(error)
        return entry.result()


def config_key() -> tuple[Hashable, ...]:
    """Return the JAX settings that change what a trace compiles to."""
    names = ("jax_enable_x64", "jax_default_matmul_precision")
    return tuple(getattr(jax.config, name) for name in names)


STEPS = StepCache()

Key = tuple[Hashable, ...]
Measured = tuple[float, float, float]  # a step's median and p99, the host's median
_MOST_REST = 64  # times the first patience


@dataclass(slots=True)
class _Seen:
    """Measurements of a bucket, seconds, by time and by size.

    Attributes:
        last_s: by time.
        ordered_s: by size.
        host_s: what the last ones took the host, by time.
        at: how many steps its lane had run by the last one, or when some were dropped.
        patience: steps of its lane without it until it has rested.
    """

    patience: int
    last_s: deque[float] = field(default_factory=deque)
    ordered_s: list[float] = field(default_factory=list)
    host_s: deque[float] = field(default_factory=deque)
    at: int = 0

    def drop(self, step_s: float) -> None:
        """Forget one measurement."""
        self.last_s.remove(step_s)
        del self.ordered_s[bisect_left(self.ordered_s, step_s)]


class CostTable:
    """Measured step times by bucket, seconds: median and p99 of the last ones.

    Beside them the median of what the host did for such a step: where that is more,
    there are no more steps a second, however fast the device.

    A median forgets a stall (a first call, a preempted thread) that a mean would keep;
    what has to be in time goes by the p99, over a longer window. A bucket that stalls
    made look slow is not chosen, so nothing would ever correct it: when it has rested,
    the slower half of what it measured is forgotten, so that it is tried again; the
    more often, the longer that takes.

    A key begins with the name of its lane.
    """

    def __init__(
        self, window: int = 16, p99_window: int = 128, patience: int = 64
    ) -> None:
        """Start empty.

        Args:
            window: medians are over so many steps of a bucket.
            p99_window: and p99s over so many.
            patience: steps of a lane without a bucket until that has rested, at first.
        """
        self._window, self._p99_window = window, p99_window
        self._patience = patience
        self._seen: dict[Key, _Seen] = {}
        self._num_steps: dict[Hashable, int] = {}  # of each lane

    def record(self, key: Key, step_s: float, host_s: float = 0.0) -> Measured:
        """Add a measurement, and what the step took the host; return what is known."""
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = _Seen(self._patience)
        if len(seen.last_s) == self._p99_window:
            seen.drop(seen.last_s[0])
        seen.last_s.append(step_s)
        insort(seen.ordered_s, step_s)
        seen.host_s.append(host_s)
        if len(seen.host_s) > self._window:
            seen.host_s.popleft()
        seen.at = self._num_steps[key[0]] = self._num_steps.get(key[0], 0) + 1
        return self._times(seen)

    def fastest_s(self, key: Key) -> float:
        """Return the least of a bucket's measurements, 0 without any."""
        seen = self._seen.get(key)
        return seen.ordered_s[0] if seen else 0.0

    def rested(self, lane: str) -> dict[Key, Measured]:
        """Return new predictions of buckets that have not run for long, if any."""
        now, found = self._num_steps.get(lane, 0), {}
        if now % self._patience:
            return found
        for key, seen in self._seen.items():
            num = len(seen.last_s)
            is_rested = key[0] == lane and now - seen.at >= seen.patience
            if is_rested and num > 1:
                most = _MOST_REST * self._patience
                seen.at, seen.patience = now, min(2 * seen.patience, most)
                for slow_s in seen.ordered_s[num // 2 :]:
                    seen.drop(slow_s)
                for slow_s in sorted(seen.host_s)[(len(seen.host_s) + 1) // 2 :]:
                    seen.host_s.remove(slow_s)
                found[key] = self._times(seen)
        return found

    def forget(self, lane: str) -> None:
        """Drop the measurements of a lane that ended."""
        self._num_steps.pop(lane, None)
        for key in [key for key in self._seen if key[0] == lane]:
            del self._seen[key]

    def _times(self, seen: _Seen) -> Measured:
        recent_s = sorted(islice(reversed(seen.last_s), self._window))
        # At most one in a hundred exceeds it; of a few, none.
        p99_s = seen.ordered_s[-2 if len(seen.ordered_s) > 8 else -1]
        host_s = sorted(seen.host_s)
        return _median(recent_s), p99_s, _median(host_s)


def _median(ordered_s: Sequence[float]) -> float:
    return ordered_s[(len(ordered_s) - 1) // 2]
