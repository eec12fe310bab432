"""Who may be served: the state of the device, and jobs in quarantine. Pure.

Rules:
    A lost device is asked again after a pause that doubles; until it answers rightly,
    nothing is started and nothing is taken.
    A job whose requests fail alone, several times in a row, is put in quarantine. It
    leaves by a swap of its weights. After a pause that doubles, one request at a time
    is let through: an answer frees the job, a failure doubles the pause.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_FAILURES_IN_A_ROW = 3
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True)
class Health:
    """What `Engine.health` found.

    Attributes:
        is_healthy: whether the canary was answered, rightly, in time.
        reason: why not; empty if healthy.
        latency_s: seconds from the canary's launch to its answer; None without one.
        num_tenants: jobs in the engine.
        num_ready: those that a compiled step serves.
        queued: requests waiting.
        quarantined: jobs in quarantine, sorted.
        restarts: how often the serving loop failed and began anew.
    """

    is_healthy: bool
    reason: str
    latency_s: float | None
    num_tenants: int
    num_ready: int
    queued: int
    quarantined: tuple[str, ...]
    restarts: int


@dataclass(slots=True)
class _Pause:
    """A time to wait until, longer each time."""

    begun_s: float = 0.0
    length_s: float = 0.0

    def lengthen(self, now_s: float) -> None:
        longer_s = max(2 * self.length_s, _FIRST_PAUSE_S)
        self.length_s = min(longer_s, _LONGEST_PAUSE_S)
        self.begun_s = now_s

    def left_s(self, now_s: float) -> float:
        if now_s < self.begun_s:  # a clock that jumped back must not prolong it
            return 0.0
        return max(self.length_s - (now_s - self.begun_s), 0.0)


class DeviceState:
    """Whether the device serves.

    Attributes:
        reason: why it does not; empty while it does.
        is_final: whether it never will again.
    """

    def __init__(self) -> None:
        """Start well."""
        self.reason = ""
        self.is_final = False
        self._pause = _Pause()

    def lose(self, reason: str, now_s: float) -> None:
        """Take note that the device failed, again perhaps."""
        self.reason = reason
        self._pause.lengthen(now_s)

    def give_up(self, reason: str) -> None:
        """Take note that nothing will be served any more."""
        self.reason, self.is_final = reason, True

    def recover(self) -> None:
        """Take note that the device answers again."""
        self.reason, self._pause = "", _Pause()

    def probe_in_s(self, now_s: float) -> float:
        """Return the seconds until a lost device should be asked again."""
        return self._pause.left_s(now_s)


@dataclass(slots=True)
class _Record:
    failures: int = 0
    reason: str = ""
    pause: _Pause | None = None


class Quarantine:
    """Jobs whose requests fail alone; all the others are unknown to it."""

    def __init__(self) -> None:
        """Start empty."""
        self._records: dict[str, _Record] = {}

    def __bool__(self) -> bool:
        """Return whether any job failed since it was last answered."""
        return bool(self._records)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the jobs in quarantine, sorted."""
        return iter(sorted(name for name, r in self._records.items() if r.pause))

    def reason(self, job: str) -> str | None:
        """Return why a job is in quarantine; None if it is not."""
        record = self._records.get(job)
        return record.reason if record and record.pause else None

    def blame(self, job: str, reason: str, now_s: float) -> bool:
        """Count a failure alone; return whether the job is in quarantine now."""
        record = self._records.setdefault(job, _Record())
        record.failures += 1
        if record.failures < _FAILURES_IN_A_ROW:
            return False
        record.reason = f"{record.failures} of its requests failed in a row: {reason}"
        record.pause = record.pause or _Pause()
        record.pause.lengthen(now_s)
        return True

    def release(self, job: str) -> bool:
        """Forget a job's failures; return whether it was in quarantine."""
        record = self._records.pop(job, None)
        return record is not None and record.pause is not None

    def admits(self, job: str, now_s: float, outstanding: int) -> bool:
        """Return whether a job's request may be taken.

        Args:
            job: whose it is.
            now_s: the time.
            outstanding: its requests that have no outcome yet.
        """
        record = self._records.get(job)
        if record is None or record.pause is None:
            return True
        return not outstanding and not record.pause.left_s(now_s)
