"""Every error that stfuse raises; each carries the names of the jobs it is about."""


class StfuseError(Exception):
    """Base of every error that stfuse raises on purpose.

    Attributes:
        jobs: names of the jobs that the error is about, possibly empty.
    """

    def __init__(self, message: str, *, jobs: tuple[str, ...] = ()) -> None:
        """Keep the message and the names of the jobs it is about."""
        super().__init__(message)
        self.jobs = tuple(jobs)

    def about(self, job: str) -> "StfuseError":
        """Return another that is about one job, if this one does not say which.

        No two futures share an error: its traceback would show one owner's frames to
        the others.
        """
        text = str(self) if self.jobs else f"job '{job}': {self}"
        own = type(self)(text, jobs=self.jobs or (job,))
        own.__cause__ = self.__cause__
        return own


class JobError(StfuseError, ValueError):
    """A job cannot be used as it was handed in; nothing else is affected."""


class RequestError(StfuseError, ValueError):
    """One request is malformed; only that request is refused."""


class QueueFullError(StfuseError):
    """A bounded queue is full; try again after some of it was served.

    Args:
        message: what was found, what was expected, what to do.
        jobs: names of the jobs that it is about.
        retry_after_s: when there may be room again, seconds; None if unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        jobs: tuple[str, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        """Keep the estimate beside the message."""
        super().__init__(message, jobs=jobs)
        self.retry_after_s = retry_after_s


class DeadlineError(StfuseError, TimeoutError):
    """A request's deadline passed, or was sure to pass, before it started."""


class ClosedError(StfuseError):
    """The engine is closed, or the job was removed, before the request ran."""


class DeviceError(StfuseError, RuntimeError):
    """The device, or the compiler for it, failed while running this job."""
