"""For tests: a clock moved by hand, a device that fails on cue, a job to check by hand.

Example:
    >>> import numpy as np, stfuse
    >>> clock = ManualClock()
    >>> device = FakeDevice(clock, step_s=0.01)
    >>> with stfuse.Engine(device=device, clock=clock) as engine:
    ...     ready = engine.add(affine_job("a", scale=2.0, shift=1.0))
    ...     engine.infer("a", np.ones((1, 3), np.float32)).tolist()
    [[3.0, 3.0, 3.0]]
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse._arrivals import (
    Arrivals,
    diurnal,
    flash_crowd,
    poisson,
    read_arrivals,
    varying,
    zipf_shares,
)
from stfuse._device import JaxDevice
from stfuse._job import Job
from stfuse._simulate import Simulation, simulate

__all__ = [
    "Arrivals",
    "FakeDevice",
    "ManualClock",
    "Simulation",
    "affine_job",
    "diurnal",
    "flash_crowd",
    "poisson",
    "read_arrivals",
    "simulate",
    "varying",
    "zipf_shares",
]

_NUMBERS = itertools.count()


class ManualClock:
    """A clock that moves only when told to; an engine that uses it wakes up then.

    Args:
        now_s: where it starts, seconds.

    Example:
        >>> clock = ManualClock(5.0)
        >>> clock.advance(0.5)
        >>> clock()
        5.5
    """

    def __init__(self, now_s: float = 0.0) -> None:
        """Start at ``now_s``."""
        self._now_s = now_s
        self._listeners: list[Callable[[], None]] = []

    def __call__(self) -> float:
        """Return the time, seconds."""
        return self._now_s

    def advance(self, by_s: float) -> None:
        """Move the clock (backwards too: a fault to be tested), and wake listeners.

        Args:
            by_s: seconds.
        """
        self._now_s += by_s
        for wake in list(self._listeners):
            wake()

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called after every move.

        Args:
            wake: called without arguments, on the thread that moves the clock.
        """
        self._listeners.append(wake)


class FakeDevice:
    """A device that computes for real, takes the time it is told to, and fails on cue.

    Args:
        clock: moved by ``step_s`` whenever a step is read; None leaves time alone.
        step_s: seconds of a step, or a function of its input buffers.
        computes: if not, every answer is zeros, at no cost: to time the host alone.
            Its canary is wrong then, so that it has no health and no fault to find.
        memory_limit_bytes: how much it says that it has; None for no limit.

    Attributes:
        num_compiles: steps compiled.
        num_launches: steps launched, failed ones included.
        num_reads: steps waited for, the one that is being waited for included.
        compile_error: raised by every compile while it is set.
        launch_error: ``launch_error(inputs)`` returns an error to raise, or None.
        read_error: raised by every read while it is set.
        corrupt: ``corrupt(outputs)`` changes what a step computed; None for nothing.
    """

    def __init__(
        self,
        clock: ManualClock | None = None,
        *,
        step_s: float | Callable[[Any], float] = 0.001,
        computes: bool = True,
        memory_limit_bytes: int | None = None,
    ) -> None:
        """Start healthy."""
        self.memory_limit_bytes = memory_limit_bytes
        self._computes = computes
        self.name = f"fake:{next(_NUMBERS)}"  # shares no compiled step with another
        self._real = JaxDevice(is_pinned=False)  # its buffers are ordinary ones
        self._clock = clock
        self._step_s = step_s
        self._open = threading.Event()
        self._open.set()
        self.num_compiles = 0
        self.num_launches = self.num_reads = 0
        self.compile_error: Exception | None = None
        self.launch_error: Callable[[Any], Exception | None] | None = None
        self.read_error: Exception | None = None
        self.corrupt: Callable[[Sequence[Any]], Sequence[Any]] | None = None

    def hold(self) -> None:
        """Let no step finish until `release`."""
        self._open.clear()

    def release(self) -> None:
        """Let steps finish again."""
        self._open.set()

    def compile(self, step_fn: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
        """Compile for the real device, or raise ``compile_error``.

        Args:
            step_fn: what to compile.
            *specs: per argument a pytree of ``jax.ShapeDtypeStruct``.

        Returns:
            The compiled step.

        Raises:
            Exception: ``compile_error``, while it is set.
        """
        self.num_compiles += 1
        if self.compile_error is not None:
            raise self.compile_error
        if not self._computes:
            return _zeros(step_fn, *specs)
        return self._real.compile(step_fn, *specs)

    def put(self, tree: Any) -> Any:
        """Copy arrays to the real device.

        Args:
            tree: pytree of arrays.

        Returns:
            The tree, on the device.
        """
        return self._real.put(tree)

    def put_on_host(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Copy arrays to the memory of the real device's host.

        Args:
            leaves: arrays.

        Returns:
            The arrays, there.
        """
        return self._real.put_on_host(leaves)

    def launch(
        self, compiled: Callable[..., Any], bank: Any, slots: Any, inputs: Any
    ) -> Any:
        """Launch on the real device, or raise what ``launch_error`` returns.

        Args:
            compiled: from `compile`.
            bank: device arrays.
            slots: host arrays.
            inputs: host buffers.

        Returns:
            What `read` takes.

        Raises:
            Exception: what ``launch_error(inputs)`` returned.
        """
        self.num_launches += 1
        error = self.launch_error(inputs) if self.launch_error else None
        if error is not None:
            raise error
        step_s = self._step_s(inputs) if callable(self._step_s) else self._step_s
        return self._real.launch(compiled, bank, slots, inputs), step_s

    def read(self, outputs: Any) -> Sequence[Any]:
        """Wait while held, move the clock, and return the real outputs.

        Args:
            outputs: what `launch` returned.

        Returns:
            Per output array of the step, itself on the host, or None.

        Raises:
            Exception: ``read_error``, while it is set.
        """
        self.num_reads += 1
        self._open.wait()
        real, step_s = outputs
        if self._clock is not None:
            self._clock.advance(step_s)
        if self.read_error is not None:
            raise self.read_error
        found = self._real.read(real)
        return found if self.corrupt is None else self.corrupt(found)


def _zeros(step_fn: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
    """Return a function that gives what a step would, but zeros, the same each time."""
    outputs = jax.eval_shape(step_fn, *specs)
    zeros = [None if x is None else np.zeros(x.shape, x.dtype) for x in outputs]
    return lambda bank, slots, inputs: zeros


def affine_job(
    name: str,
    *,
    scale: float = 2.0,
    shift: float = 1.0,
    width: int = 3,
    **options: Any,
) -> Job:
    """Return a job that computes ``scale * x + shift``, as a matrix product.

    Args:
        name: its name.
        scale: on the diagonal of its matrix.
        shift: its bias.
        width: F; inputs and outputs are float32 ``[B, F]``.
        **options: passed on to `stfuse.Job`.

    Returns:
        The job; at the default scale and shift, ones give threes.
    """
    params = {
        "scale": np.eye(width, dtype=np.float32) * np.float32(scale),
        "shift": np.full((width,), shift, np.float32),
    }
    example = np.zeros((1, width), np.float32)
    return Job(name, _affine, params, example, **options)


def _affine(params: Any, x: Any) -> Any:
    return jnp.dot(x, params["scale"], precision="highest") + params["shift"]
