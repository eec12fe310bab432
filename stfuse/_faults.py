"""What follows when a step, the device, a job or the serving loop fails.

Rules:
    When a step fails, the canary runs first. If that fails too, the device is lost:
    all that waits fails with it, and nothing is taken until a canary is answered.
    Else the step is run again by halves until the request that breaks it stands alone;
    that one gets the error, and its job the blame.
    An error of the serving loop itself fails all that waits, once, and the loop begins
    anew; if it fails again before it served a step, nothing is served any more.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

from absl import logging

from stfuse._books import Books
from stfuse._canary import Canary
from stfuse._errors import DeviceError
from stfuse._flight import Flight, Request, Tenant, halves
from stfuse._health import DeviceState, Quarantine
from stfuse._metrics import Metrics
from stfuse._types import Batch, Clock, Device


class Faults:
    """The state of the device, jobs in quarantine, and steps to be run again.

    Args:
        lock: the engine's.
        clock: seconds.
        device: what may fail.
        books: who waits.
        in_flight: steps that are lost with the device.
        metrics: counts who is refused.
    """

    def __init__(
        self,
        lock: threading.Condition,
        clock: Clock,
        device: Device,
        books: Books,
        in_flight: deque[Flight],
        metrics: Metrics,
    ) -> None:
        """Start without a fault."""
        self.canary = Canary(device)
        self.state = DeviceState()
        self.quarantine = Quarantine()
        self.retries: deque[Batch] = deque()
        self.num_restarts = 0
        self._lock = lock
        self._clock = clock
        self._books = books
        self._in_flight = in_flight
        self._metrics = metrics

    def admit(self, tenant: Tenant) -> None:
        """Refuse at once what would not be served; the lock is held.

        Raises:
            DeviceError: the device is lost, or the job in quarantine.
        """
        name, reason = tenant.job.name, ""
        if self.state.reason:
            reason = f"{self.state.reason}. Submit again once `health` says yes"
        elif not self.quarantine.admits(name, self._clock(), tenant.outstanding):
            reason = (
                f"it is in quarantine, {self.quarantine.reason(name)}. Swap its "
                f"weights, or submit again later"
            )
        if reason:
            self._metrics.count(name, "unavailable")
            raise DeviceError(
                f"`stfuse.Engine.submit`: job '{name}' is not served now: {reason}.",
                jobs=(name,),
            )

    def probe(self) -> tuple[str, float | None]:
        """Run the canary, on the device thread, and act on what it says.

        Returns:
            What is wrong, or nothing; and the seconds that the canary took, if it ran.
        """
        if self.state.is_final:
            return self.state.reason, None
        if not self.canary.is_ready:
            return self.state.reason or self.canary.failure, None
        start_s = self._clock()
        problem = self.canary.problem()
        now_s = self._clock()
        if problem:
            self.lose(problem, now_s)
        elif self.state.reason:
            with self._lock:
                self.state.recover()
            logging.info("stfuse: the device is back")
        return problem, max(now_s - start_s, 0.0)

    def lose(self, problem: str, now_s: float) -> None:
        """Take the device for lost; fail all that waits for it."""
        was_lost = bool(self.state.reason)
        with self._lock:  # first, so that nothing new is taken
            self.state.lose(f"the device is lost, {problem}", now_s)
        if not was_lost:
            logging.error("stfuse: %s", self.state.reason)
            self._fail_all()

    def failed(
        self, batch: Batch, requests: Mapping[int, Request], error: Exception
    ) -> None:
        """Deal with a step that raised: find out whose fault it is."""
        if self.canary.is_ready and self.probe()[0]:
            return  # everybody knows by now
        numbers = [(c.tenant, n) for c in batch.chunks for n in c.requests]
        if len(numbers) > 1:
            self.retries.extend(halves(batch, requests))
            return
        for name, number in numbers:
            text = f"{type(error).__name__}: {error}"
            failure = DeviceError(
                f"job '{name}': the step failed: {text}", jobs=(name,)
            )
            failure.__cause__ = error
            # Blamed before its owner knows: what that does next finds it so.
            reason = self._blame(name, text)
            self._books.finish([(number, failure)], "failed")
            if reason:
                refused = DeviceError(f"job '{name}' {reason}", jobs=(name,))
                self._books.fail_queued(refused, [name])

    def answered(self, batch: Batch) -> None:
        """Take note that jobs were served: whoever is, is no longer under suspicion."""
        for chunk in batch.chunks:
            self.release(chunk.tenant)

    def release(self, name: str) -> None:
        """Let a job out of quarantine, if it is there."""
        with self._lock:
            was_in = self.quarantine.release(name)
        if was_in:
            logging.info("stfuse: job '%s' left its quarantine", name)

    def restarted(self, error: BaseException, *, is_again: bool) -> None:
        """Deal with an error of the serving loop, which is about to begin anew."""
        reason = f"the serving loop failed, {type(error).__name__}: {error}"
        logging.error("stfuse: %s", reason, exc_info=error)
        with self._lock:
            self.num_restarts += 1
            self.state.reason = self.state.reason or reason
        try:
            self._fail_all()
        except Exception as again:
            is_again, reason = True, f"{reason}; then {type(again).__name__}: {again}"
        with self._lock:
            if is_again:
                self.state.give_up(f"{reason}; close this engine and build a new one")
            elif self.state.reason == reason:
                self.state.recover()

    def _fail_all(self) -> None:
        self.retries.clear()
        self._in_flight.clear()
        self._books.fail_all(DeviceError(self.state.reason))

    def _blame(self, name: str, text: str) -> str:
        """Count a failure against a job; return why it has just been put away."""
        with self._lock:
            was_in = self.quarantine.reason(name) is not None
            is_in = self.quarantine.blame(name, text, self._clock())
        if not is_in or was_in:
            return ""
        reason = f"is in quarantine, {self.quarantine.reason(name)}"
        logging.error("stfuse: job '%s' %s", name, reason)
        return reason
