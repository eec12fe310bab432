"""One accelerator serves many different models as if they were one.

    job    = stfuse.Job(name, apply_fn, params, example)   # what a tenant hands in
    fused  = stfuse.fuse(jobs)                              # trace, group, lower
    bank   = fused.pack()                                   # parameters, stacked
    outs   = fused(bank, {name: inputs})                    # stack, step, split
    engine = stfuse.Engine()                                # the same under deadlines:
    engine.add(job)                                         # compiled off the path
    future = engine.submit(name, inputs)                    # queued, batched, answered

`fuse` is `map` with fewer kernels: whatever the other jobs are, send, or do.
"""

from stfuse._bank import Bank
from stfuse._engine import Engine
from stfuse._errors import (
    ClosedError,
    DeadlineError,
    DeviceError,
    JobError,
    QueueFullError,
    RequestError,
    StfuseError,
)
from stfuse._fuse import Fused, fuse
from stfuse._health import Health
from stfuse._job import Job
from stfuse._metrics import BucketStats, HostStats, Snapshot, TenantStats
from stfuse._plan import Launch, Plan
from stfuse._types import Cost

__all__ = [
    "Bank",
    "BucketStats",
    "ClosedError",
    "Cost",
    "DeadlineError",
    "DeviceError",
    "Engine",
    "Fused",
    "Health",
    "HostStats",
    "Job",
    "JobError",
    "Launch",
    "Plan",
    "QueueFullError",
    "RequestError",
    "Snapshot",
    "StfuseError",
    "TenantStats",
    "fuse",
]
