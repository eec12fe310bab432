"""Measures ways to compute one thing on the live device, and remembers.

Rules:
    Measuring takes time, so there is a budget for the whole process; when it is spent,
    or for what is too small to matter, the caller's guess stands.
    A guess is left only for what is faster by more than the noise.
    One measurement at a time: two would time each other.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from stfuse._lower import _store
from stfuse._plan import Launch
from stfuse._program import Op
from stfuse._types import Cost

_BUDGET_S = {"cpu": 30.0, "gpu": 120.0}
_FOR_STEPS = 0.5  # of the budget: launches alone must not spend it all
# A launch that takes less is not worth a compile for each way to compute it.
_SMALLEST_S = {"cpu": 50e-6, "gpu": 2e-6}
_SMALLEST_STEP_S = {"cpu": 100e-6, "gpu": 20e-6}
_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision")
_MARGIN = 0.95  # of the guess's time
_CACHE_BYTES = 64 << 20  # in a step, weights come from memory, not from a cache
_MAX_UNROLLED = 16

_lock = threading.RLock()  # tracing a step that is measured may ask, too
_known: dict[str, dict[str, float]] = {}  # question -> seconds by way
_spent_s = 0.0


def budget_s(reserve: float = 0.0) -> float:
    """Return the seconds that this process may still spend on measuring.

    ``STFUSE_MEASURE_BUDGET_S`` sets the whole; 0 turns measuring off.

    Args:
        reserve: which part of the whole is to be left over.
    """
    return (1 - reserve) * _whole_s() - _spent_s


def _whole_s() -> float:
    given = os.environ.get("STFUSE_MEASURE_BUDGET_S")
    return float(given) if given else _BUDGET_S.get(jax.default_backend(), 0.0)


def is_on(cost: Cost) -> bool:
    """Return whether what a plan is made for may be measured at all."""
    return is_live(cost) and _whole_s() > 0


def is_live(cost: Cost) -> bool:
    """Return whether a plan is made for the device at hand."""
    platform = {"h200": "gpu"}.get(cost.source, cost.source)
    return platform == jax.default_backend()


def is_worth(op: Op, times: int, cost: Cost) -> bool:
    """Return whether a launch is large enough, and for this device, to be measured.

    Args:
        op: the op of one job at one row.
        times: how many of them the launch computes.
        cost: the device that the plan is for.
    """
    if not is_on(cost):
        return False
    work_s = max(op.flops / cost.flops_per_s, op.num_bytes / cost.bytes_per_s) * times
    return work_s >= _SMALLEST_S.get(jax.default_backend(), np.inf)


def is_worth_step(launches: Sequence[Launch], rows: int, cost: Cost) -> bool:
    """Return whether a step is large enough to be measured in several ways.

    Args:
        launches: of its plan.
        rows: B of each slot.
        cost: the device that the plan is for.
    """
    if not is_on(cost):
        return False
    work_s = sum(cost.seconds(rows * one.flops, one.num_bytes) for one in launches)
    return work_s >= _SMALLEST_STEP_S.get(jax.default_backend(), np.inf)


def fastest(
    ways: Mapping[str, Callable[[Sequence[Any]], Any]],
    op: Op,
    is_stacked: Sequence[bool],
    size: tuple[int, int],
    guess: str,
    *,
    is_timed: bool = True,
) -> str:
    """Return the name of the fastest way to compute a stacked op.

    Args:
        ways: by name, ``operands -> outputs``; operands as `_lower.apply` takes them.
        op: the op of one job at one row.
        is_stacked: per operand, whether it has slots.
        size: K, slots, and B, rows, which are mapped outside.
        guess: whose time the others have to beat; what is used if time is up.
        is_timed: whether to measure what is not known yet.
    """
    num_slots, rows = size
    shapes = f"{op.name} {op.in_specs} {sorted(op.params.items())}"
    question = f"{shapes} {is_stacked} {num_slots} {rows} {sorted(ways)}"

    def runs() -> dict[str, Callable[[], Any]]:
        # Operands with rows: a matrix of weights has none, attention's has.
        has_batch = op.name == "dot_general" and op.params["dimension_numbers"][1][0]
        has_rows = (True, bool(has_batch))
        with jax.ensure_compile_time_eval():  # the question comes from within a trace
            sets = _operand_sets(op, is_stacked, has_rows, num_slots, rows)
        # Rows come second, after the slots, where the step's own mapping has them.
        pairs = zip(is_stacked, has_rows, strict=True)
        axes = ([int(stacked) if rowed else None for stacked, rowed in pairs],)
        return {
            name: _in_turns(jax.vmap(way, in_axes=axes, out_axes=1), sets)
            for name, way in ways.items()
            if name != "unrolled" or num_slots <= _MAX_UNROLLED
        }

    return pick(question, runs, guess, reserve=_FOR_STEPS if is_timed else 1.0)


def pick(
    question: str,
    runs: Callable[[], Mapping[str, Callable[[], Any]]],
    guess: str,
    *,
    reserve: float = 0.0,
) -> str:
    """Return the name of the fastest of some callables, measured at most once.

    Args:
        question: what they compute, as text; the device and versions are added.
        runs: makes them, each of which computes once and returns what to wait for.
        guess: the one to use unless another is faster by more than noise.
        reserve: which part of the budget to leave over.
    """
    kind = jax.devices()[0].device_kind
    settings = [getattr(jax.config, name) for name in _SETTINGS]
    question = f"{kind} jax {jax.__version__} {settings} {question}"
    seconds = _known.get(question)
    if seconds is None:
        with _lock:
            seconds = _known.get(question) or _store.load(question)
            if seconds is None and budget_s(reserve) > 0:
                seconds, is_whole = _timed(runs, guess, budget_s(reserve))
                if is_whole:  # else another process may have the time
                    _store.save(question, seconds)
            if seconds is not None:
                _known[question] = seconds
    if not seconds:
        return guess
    best = min(seconds, key=seconds.__getitem__)
    is_better = guess not in seconds or seconds[best] < _MARGIN * seconds[guess]
    return best if is_better else guess


def fastest_step(steps: Mapping[str, Any], given: tuple[Any, ...], guess: str) -> str:
    """Return the fastest of some whole steps.

    What wins alone may lose among its neighbors.

    Args:
        steps: jitted, by name.
        given: what to call them with, on the device.
        guess: the one to use unless another is faster.
    """
    lowered = {name: step.lower(*given) for name, step in steps.items()}
    texts = {name: one.as_text() for name, one in lowered.items()}
    first = {text: name for name, text in reversed(texts.items())}
    names = sorted(first.values(), key=list(steps).index)  # equal programs: one
    guess = first[texts[guess]]
    digest = hashlib.sha256("".join(texts[name] for name in names).encode())
    question = f"step {digest.hexdigest()} {names}"

    def runs() -> dict[str, Callable[[], Any]]:
        return {name: functools.partial(steps[name], *given) for name in names}

    return pick(question, runs, guess) if len(names) > 1 else guess


def known() -> dict[str, dict[str, float]]:
    """Return what this process knows: by question, seconds of each way."""
    return {question: dict(seconds) for question, seconds in _known.items()}


def forget() -> None:
    """Forget what this process has measured and spent; what is on disk stays."""
    global _spent_s
    _known.clear()
    _spent_s = 0.0


def _timed(
    runs: Callable[[], Mapping[str, Callable[[], Any]]], guess: str, left_s: float
) -> tuple[dict[str, float], bool]:
    """Return seconds per call by name, and whether all could be timed.

    What a backend refuses, or has no memory for, is left out.
    """
    global _spent_s
    start_s, seconds, is_whole = time.perf_counter(), {}, True
    try:
        made = dict(runs())
    except Exception as error:
        logging.warning("stfuse: nothing could be measured: %s", error)
        made, is_whole = {}, False
    for name in sorted(made, key=lambda name: name != guess):
        if seconds and time.perf_counter() - start_s > left_s:
            is_whole = False
            break
        try:
            seconds[name] = best_s(made[name], min(seconds.values(), default=None))
        except Exception as error:
            logging.warning("stfuse: %s could not be measured: %s", name, error)
            is_whole = False  # it may have been out of memory only now
    _spent_s += time.perf_counter() - start_s
    return seconds, is_whole


def best_s(run: Callable[[], Any], limit_s: float | None = None) -> float:
    """Return the best seconds per call of a few rounds; one is enough if it is slow.

    Args:
        run: computes once and returns what to wait for.
        limit_s: what it has to compete with.
    """
    jax.block_until_ready(run())  # compiles
    start_s = time.perf_counter()
    jax.block_until_ready(run())
    once_s = max(time.perf_counter() - start_s, 1e-7)
    if limit_s is not None and once_s > 5 * limit_s + 1e-3:
        return once_s
    num_calls = int(np.clip(4e-3 / once_s, 2, 50))
    rounds = []
    for _ in range(4):
        start_s = time.perf_counter()
        jax.block_until_ready([run() for _ in range(num_calls)])
        rounds.append((time.perf_counter() - start_s) / num_calls)
    return min(rounds)


def _in_turns(way: Callable[[Sequence[Any]], Any], sets: Sequence[Any]) -> Any:
    """Return what computes every set of operands, in the company of light ops."""

    def run(sets: Any) -> Any:
        found = []
        for operands in sets:
            outs = way(operands)
            # Around products a step has biases, scales and activations.
            found += [
                jnp.maximum(y, jnp.zeros((), y.dtype)) + jnp.ones((), y.dtype)
                for y in outs
            ]
        return found

    @functools.cache
    def compiled() -> Any:  # ahead of time, so that a trace around does not see it
        return jax.jit(run).lower(sets).compile()

    return lambda: compiled()(sets)


def _operand_sets(
    op: Op,
    is_stacked: Sequence[bool],
    has_rows: Sequence[bool],
    num_slots: int,
    rows: int,
) -> list[list[Any]]:
    """Return operands filled with noise: zeros would be faster than data is."""
    shapes = []
    for spec, stacked, rowed in zip(op.in_specs, is_stacked, has_rows, strict=True):
        lead = ((num_slots,) if stacked else ()) + ((rows,) if rowed else ())
        shapes.append((*lead, *spec.shape))
    sizes = [
        np.prod(shape) * spec.dtype.itemsize
        for shape, spec in zip(shapes, op.in_specs, strict=True)
    ]
    num_sets = int(np.clip(_CACHE_BYTES // max(sum(sizes), 1), 1, 4))
    rng = np.random.default_rng(0)  # JAX's is folded by XLA within a trace: seconds

    def draw(shape: tuple[int, ...], dtype: Any) -> Any:
        noise = 0.1 * rng.standard_normal(shape, np.float32)
        return jax.device_put(noise.astype(dtype))

    return [
        [
            draw(shape, spec.dtype)
            for shape, spec in zip(shapes, op.in_specs, strict=True)
        ]
        for _ in range(num_sets)
    ]
