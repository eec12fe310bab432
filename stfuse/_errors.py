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
