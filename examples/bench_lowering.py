"""Time the ways to compute one stacked convolution, layer by layer.

Prints microseconds of the whole stack, best of several, and what the chooser picks
when it must not measure.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

import stfuse
from stfuse import _cost, _lower
from stfuse._trace import Op, trace

_JOBS = flags.DEFINE_integer("jobs", 16, "K, convolutions in the stack")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of all arrays")
_REPEATS = flags.DEFINE_integer("repeats", 50, "calls per timing")
_SMOKE = flags.DEFINE_bool("smoke", False, "one small layer only")

# rows, image side, input channels, output channels, kernel side, stride, groups
LAYERS = [
    (1, 8, 1, 16, 3, 1, 1),
    (8, 8, 1, 16, 3, 1, 1),
    (1, 8, 16, 32, 3, 1, 1),
    (8, 8, 16, 32, 3, 1, 1),
    (1, 28, 16, 32, 3, 1, 1),
    (1, 28, 128, 128, 3, 1, 1),
    (1, 14, 256, 1024, 1, 1, 1),
    (1, 56, 64, 128, 3, 2, 1),
    (1, 28, 192, 192, 3, 1, 192),
]


BOTH = (True, True)
WAYS = ("native", "unrolled", "patches", "shifted", "kernel", "scaled")


def conv_op(
    rows: int, side: int, c_in: int, c_out: int, k: int, stride: int, groups: int
) -> Op:
    """Return the op of one job's convolution, NHWC, same padding."""

    def apply_fn(kernel: jax.Array, images: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    dtype = np.dtype(_DTYPE.value)
    job = stfuse.Job(
        "conv",
        apply_fn,
        jax.ShapeDtypeStruct((k, k, c_in // groups, c_out), dtype),
        jax.ShapeDtypeStruct((rows, side, side, c_in), dtype),
        batched=False,
    )
    return trace(job).ops[0]


def best_us(run: Callable[..., Any], operands: tuple[Any, ...]) -> float:
    """Return microseconds of a call, best of five groups of calls."""
    jax.block_until_ready(run(*operands))
    times_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        for _ in range(_REPEATS.value):
            out = run(*operands)
        jax.block_until_ready(out)
        times_s.append((time.perf_counter() - start_s) / _REPEATS.value)
    return min(times_s) * 1e6


def main(_: list[str]) -> None:
    """Print the table."""
    cost, rng, num_jobs = _cost.resolve("auto"), np.random.default_rng(0), _JOBS.value
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {num_jobs} jobs")
    print(
        f"{'rows side in>out k/stride groups':28}",
        *(f"{n:>10}" for n in WAYS),
        " picks",
    )
    for layer in LAYERS[:1] if _SMOKE.value else LAYERS:
        op = conv_op(*layer)
        rows, side, c_in, c_out, k, stride, groups = layer
        shapes = ((rows, side, side, c_in), (k, k, c_in // groups, c_out))
        operands = tuple(
            jax.device_put(rng.normal(size=(num_jobs, *s)).astype(_DTYPE.value))
            for s in shapes
        )
        times_us = {
            n: best_us(
                jax.jit(lambda *xs, n=n, op=op: _lower.apply(n, op, xs, BOTH)), operands
            )
            for n in _lower.candidates(op, BOTH, 1, num_jobs)
        }
        size = {"num_slots": num_jobs, "rows": 1}  # the op has its rows inside
        pick = _lower.choose(op, BOTH, **size, cost=cost, mode="heuristic")
        label = f"{rows} {side} {c_in}>{c_out} {k}/{stride} {groups}"
        found = [f"{times_us[n]:.0f}" if n in times_us else "-" for n in WAYS]
        print(f"{label:33}", *(f"{text:>10}" for text in found), f" {pick}")


if __name__ == "__main__":
    app.run(main)
