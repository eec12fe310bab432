"""The vocabulary: shapes legend, small frozen records, protocols. No logic.

Axes, used by every docstring:
    J  jobs of one species (rows of a parameter stack in use)
    K  slots of one step (which parameters), K <= capacity of the stack
    B  rows per slot (requests' rows, padded up to the bucket)

A *species* is all jobs whose traces are equal; a *lane* is a group of jobs that are
served by one compiled step; a *bucket* is the shape that a step was compiled for.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

ApplyFn = Callable[[Any, Any], Any]
Clock = Callable[[], float]


class Policy(enum.Enum):
    """Who shares the device, and when.

    Attributes:
        EXCLUSIVE: one model at a time, its own requests batched.
        TIME: one request at a time, round robin over tenants.
        SPACE_TIME: requests of many tenants in one fused step.
    """

    EXCLUSIVE = "exclusive"
    TIME = "time"
    SPACE_TIME = "space-time"


class Bucket(NamedTuple):  # a key of many lookups: a dataclass hashes in Python
    """The shape of one compiled step.

    Attributes:
        slots: K of each species of the lane, 0 where a species takes no part.
        rows: B, rows per slot.
        is_open: whether all slots of all banks run, and yet read their weights by
            index, so that a tenant can have several. Else each slot of a bank that
            runs as a whole is its own tenant's.
    """

    slots: tuple[int, ...]
    rows: int
    is_open: bool = False

    @property
    def counts(self) -> dict[int, int]:
        """K of each species that takes part."""
        return {s: k for s, k in enumerate(self.slots) if k}

    def __str__(self) -> str:
        """Print as ``16+8x4``: slots of each species, then rows per slot."""
        shape = f"{'+'.join(map(str, self.slots))}x{self.rows}"
        return f"open {shape}" if self.is_open else shape


@dataclass(frozen=True, slots=True)
class Cost:
    """What the planner knows of a device.

    Attributes:
        launch_s: fixed cost of one kernel launch inside a step, seconds.
        bytes_per_s: memory bandwidth, bytes read plus written.
        flops_per_s: dense matrix rate.
        source: where the numbers come from; ``"cpu"`` is planned for as a CPU is,
            anything else as an accelerator.
    """

    launch_s: float
    bytes_per_s: float
    flops_per_s: float
    source: str = "given"

    def __post_init__(self) -> None:
        """Refuse rates that no device has."""
        rates = (self.launch_s, self.bytes_per_s, self.flops_per_s)
        if not all(rate > 0 for rate in rates):  # a NaN is no rate either
            raise ValueError(
                f"`stfuse.Cost`: found {self}; every rate must be positive."
            )

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Return the roofline time of one launch.

        Args:
            flops: its arithmetic.
            num_bytes: bytes it reads plus bytes it writes.

        Returns:
            Seconds, the launch itself included.
        """
        work_s = max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)
        return self.launch_s + work_s


@dataclass(frozen=True, slots=True)
class Join:
    """A tenant's requests are taken from now on; it is served once its lane has it."""

    tenant: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Leave:
    """A tenant takes no more requests; what it has queued is still served."""

    tenant: str


@dataclass(frozen=True, slots=True)
class Install:
    """A lane has a (new) step.

    Attributes:
        lane: its name.
        capacities: slots of each species' bank.
        members: the tenants it serves, and each one's species by length; none ends
            the lane.
        keeps_ready: whether its buckets stay ready: only the members changed.
    """

    lane: str
    capacities: tuple[int, ...]
    members: dict[str, tuple[int, ...]]
    keeps_ready: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """A bucket of a lane may be used; sent again whenever its prediction changes.

    Attributes:
        lane: its name.
        bucket: which shape.
        step_s: predicted time of a step, seconds: a median.
        p99_s: what one in a hundred takes longer than; None for ``step_s``.
        host_s: what the host does for such a step, seconds: a median.
    """

    lane: str
    bucket: Bucket
    step_s: float
    p99_s: float | None = None
    host_s: float = 0.0


class Submit(NamedTuple):  # of which there are many: a dataclass takes longer to make
    """A request arrives; refused with an error, or queued.

    Attributes:
        request: its number, larger than those before it.
        tenant: whose it is.
        rows: how many rows it has.
        now_s: when it arrived.
        deadline_s: when it must have started, on the same clock; None for whenever.
        length: which of the tenant's programs it is for.
        num_bytes: of its inputs.
    """

    request: int
    tenant: str
    rows: int
    now_s: float
    deadline_s: float | None = None
    length: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """A queued request is given up; unknown ones are ignored."""

    request: int


@dataclass(frozen=True, slots=True)
class Drain:
    """The engine is closing: no request waits for company any more."""


Event = Join | Leave | Install | Ready | Submit | Cancel | Drain


class Chunk(NamedTuple):
    """Requests of one tenant and one length that fill one slot.

    Attributes:
        tenant: whose they are.
        requests: their numbers, in order.
        rows: their rows together.
        length: which of the tenant's programs they are for.
        species: that program's place in the lane.
    """

    tenant: str
    requests: tuple[int, ...]
    rows: int
    length: int = 0
    species: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """One step to run: a lane's bucket and who is in it."""

    lane: str
    bucket: Bucket
    chunks: tuple[Chunk, ...]
    predicted_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now.

    Attributes:
        batch: the step to start, or None.
        expired: requests whose deadline passed; they never start.
        wait_until_s: when to decide again if nothing happens; None for never.
    """

    batch: Batch | None = None
    expired: tuple[int, ...] = ()
    wait_until_s: float | None = None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one served step did; the engine writes it, the metrics fold it.

    Attributes:
        lane: the lane that ran.
        bucket: the compiled shape that ran.
        step_s: measured device time of the step, seconds.
        predicted_s: what the cost table said before it ran, seconds.
        rows: true rows per tenant.
        latencies_s: per tenant, seconds from submit to answer of each request.
        late: per tenant, answers given after their deadline.
    """

    lane: str
    bucket: Bucket
    step_s: float
    predicted_s: float
    rows: dict[str, int]
    latencies_s: Mapping[str, Sequence[float]]
    late: dict[str, int]


class Device(Protocol):
    """What the engine asks of a device; `stfuse.testing.FakeDevice` is another one."""

    @property
    def name(self) -> str:
        """What it is called; devices of one name share compiled steps."""
        ...

    def compile(self, step_fn: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
        """Compile ``step_fn`` ahead of time for arguments like ``specs``."""
        ...

    def put(self, tree: Any) -> Any:
        """Copy host arrays to the device, one transfer."""
        ...

    def launch(
        self, compiled: Callable[..., Any], bank: Any, slots: Any, inputs: Any
    ) -> Any:
        """Start a step over host buffers; return without waiting for it."""
        ...

    def read(self, outputs: Any) -> Sequence[Any]:
        """Wait for a step's outputs and return them as host arrays."""
        ...
