"""What the planner knows of a device: committed records, or a short measurement."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stfuse._types import Cost

# Rounded from measurements: a launch inside a captured graph, a large copy, and a
# large bf16 (h200) or float32 (cpu, two cores) matrix product.
RECORDS = {
    "h200": Cost(3e-6, 4.3e12, 790e12, source="h200"),
    "cpu": Cost(1e-6, 1.0e10, 1.0e11, source="cpu"),
}

# On a CPU launches of models beside each other overlap, and a merged one comes with
# slices and masks that are launches, too. 12 perceptrons on two cores, us of a step at
# launches of 0.1, 0.25, 0.5, 1, 2 us: 1100, 1160, 1119, 1358, 1514; the chain says 1.9.
_CPU_OVERLAP = 8


def resolve(cost: str | Cost) -> Cost:
    """Return the record that a ``cost=`` argument names.

    Args:
        cost: ``"auto"`` (measured once on the default device), the name of a
            committed record, or a record.

    Raises:
        ValueError: no such record.
    """
    if isinstance(cost, Cost):
        return cost
    if cost == "auto":
        return _measured(default_device())
    if not isinstance(cost, str) or cost not in RECORDS:
        names = ", ".join(map(repr, ("auto", *RECORDS)))
        raise ValueError(
            f"`stfuse.fuse`: cost is {cost!r}; pass one of {names} or a `stfuse.Cost`."
        )
    return RECORDS[cost]


def default_device() -> Any:
    """Return JAX's default device, on this thread."""
    chosen: Any = jax.config.jax_default_device  # pyright: ignore
    if chosen is None or isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen


@functools.cache
def _measured(device: Any) -> Cost:
    """Measure a device in well under a second, and remember it."""
    chain = 64
    is_gpu = device.platform == "gpu"
    side, words = (4096, 1 << 27) if is_gpu else (512, 1 << 22)
    with jax.default_device(device), jax.ensure_compile_time_eval():
        square = jnp.full((side, side), 0.5, jnp.bfloat16 if is_gpu else jnp.float32)
        # Small enough to cost a launch and no more: a CPU takes 2 us for 64 x 64.
        small = jnp.full((64, 64) if is_gpu else (16, 16), 0.01)
        flat = jnp.ones((words,), jnp.float32)

        def chained(x: Any) -> Any:
            for _ in range(chain):
                x = jnp.tanh(x @ small)
            return x

        launch_s = _best_s(jax.jit(chained), small) / chain
        launch_s /= 1 if is_gpu else _CPU_OVERLAP
        copy_s = _best_s(jax.jit(lambda x: x + 1), flat)
        matmul_s = _best_s(jax.jit(lambda x: x @ x), square)
    return Cost(
        launch_s=launch_s,
        bytes_per_s=2 * flat.nbytes / copy_s,
        flops_per_s=2 * side**3 / matmul_s,
        source=device.platform,
    )


def _best_s(run: Callable[[Any], Any], x: Any) -> float:
    """Return the best of a few timings; the first call compiles."""
    jax.block_until_ready(run(x))
    times = []
    for _ in range(5):
        start_s = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - start_s)
    return max(min(times), 1e-9)
