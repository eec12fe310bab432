"""The paper's Table 1 and Figure 7: one product for each of R models.

    space-time  all products as one fused step
    in turn     one process, one product after the other
    time        a process for each (or several products a process), taking turns
    space       the same processes under CUDA MPS

All run in loops on the device, with launches in flight: nobody waits for a host.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stfuse
from examples import paper, workloads
from examples.paper import Part
from examples.paper_worker import TURN, kinds_of, make_models, repeated, set_precision
from examples.workloads import Workload
from stfuse._lower import _measure

SHAPES = ("conv2_2", "matvec", "square")
DTYPES = {  # name: of arrays, precision of products
    "float32": ("float32", "highest"),
    "tf32": ("float32", "default"),
    "bfloat16": ("bfloat16", "default"),
}
REPLICAS = (1, 2, 4, 8, 10, 16, 20, 32, 40, 64, 96, 118)
FEW = (1, 2, 10, 20, 40, 118)  # but for the paper's own shape and dtype
IN_PROCESSES = (1, 2, 4, 10, 20, 40, 118)  # of the paper's own shape
FEW_IN_PROCESSES = (1, 2, 10, 40)
SAWTOOTH = (24, 48, 56, 72, 80, 104)  # between those above
STEPS = 512  # of a launch
IN_PROCESSES_S = 3  # longer than in one: launches take turns, and end in bursts
WAYS = ("space-time", "in turn", "time", "space")
IN_FLIGHT = 2
PAPER = {"time": 7.71, "space": 3.23}  # geometric means over all R, conv2_2


def sizes_of(part: Part, shape: str, dtype: str) -> tuple[Sequence[int], Sequence[int]]:
    """Return R for one process, and R for many."""
    if part.is_small:
        return (1, 2, 3), (1, 2)
    if (shape, dtype) == (SHAPES[0], "float32"):
        return REPLICAS, IN_PROCESSES
    if shape == SHAPES[0]:
        return (*FEW[:2], 4, *FEW[2:]), IN_PROCESSES
    return FEW, FEW_IN_PROCESSES


def steps_of(part: Part) -> int:
    """Return steps per launch."""
    return TURN if part.is_small else STEPS


@functools.lru_cache(maxsize=1)
def models_of(shape: str, dtype: str, scale: str) -> tuple[Workload, list[Any]]:
    """Return a shape's workload, and as many models as are ever asked for."""
    is_small = scale == "small"
    workload = workloads.make_paper_workloads(dtype, is_small=is_small)[shape]
    return workload, make_models(workload, 0, 3 if is_small else REPLICAS[-1], dtype)


def pairs_of(part: Part) -> list[tuple[str, str]]:
    """Return shapes and dtypes, what matters most first."""
    dtypes = [*DTYPES][:1] if part.is_small else [*DTYPES]
    return [(shape, dtype) for dtype in dtypes for shape in SHAPES]


def key_of(shape: str, dtype: str, way: str, num: int) -> dict[str, Any]:
    """Return the key of one cell."""
    return {"part": "gemm", "shape": shape, "dtype": dtype, "way": way, "R": num}


def in_turn(part: Part, shape: str, dtype: str, repeat: int) -> dict[str, Any]:
    """Time one product alone: R in turn take R times as long."""
    of_arrays, precision = DTYPES[dtype]
    set_precision(precision)
    workload, ((_, params, inputs), *_) = models_of(shape, of_arrays, part.scale)
    step = jax.jit(repeated(workload.apply_fn, repeat))
    kinds = kinds_of(jax.device_put(inputs), repeat)
    tenants = timed(functools.partial(step, params, kinds), part)
    found = {"per_s": repeat * paper.per_s(tenants, part.seconds)}
    if repeat // 2 >= TURN:  # a loop that was cut short would not be twice as long
        half = jax.jit(repeated(workload.apply_fn, repeat // 2))
        tenants = timed(functools.partial(half, params, kinds), part)
        found["half_loop_per_s"] = repeat // 2 * paper.per_s(tenants, part.seconds)
    return found


def timed(launch: Any, part: Part) -> list[dict[str, Any]]:
    """Compile, then launch as fast as possible."""
    jax.block_until_ready(launch())
    return paper.closed_loop(launch, part.seconds, IN_FLIGHT)


def space_time(
    part: Part, shape: str, dtype: str, num: int, repeat: int
) -> dict[str, Any]:
    """Time R products as one fused step, and compare what it answers.

    Beside the rate, the ways to compute it that were measured, us of a product of all.
    """
    of_arrays, precision = DTYPES[dtype]
    set_precision(precision)
    workload, models = models_of(shape, of_arrays, part.scale)
    models = models[:num]
    jobs = [stfuse.Job(n, workload.apply_fn, params, x) for n, params, x in models]
    fused = stfuse.fuse(jobs)
    bank = fused.pack()
    inputs = jax.device_put(fused.stack({name: x for name, _, x in models}))
    kinds = kinds_of(inputs, repeat)
    before = _measure.known()
    step = jax.jit(repeated(fused.step, repeat))
    found = jax.device_get(step(bank, kinds))
    ways_us = {
        way: 1e6 * seconds
        for question, of_ways in _measure.known().items()
        if question not in before
        for way, seconds in of_ways.items()
    }
    plain = jax.jit(workload.apply_fn)
    alone = {name: plain(params, x) for name, params, x in models}
    answers = fused.split(found[0])
    difference, _ = workloads.differences(answers, jax.device_get(alone))
    tenants = timed(functools.partial(step, bank, kinds), part)
    rate = num * repeat * paper.per_s(tenants, part.seconds)
    return {"per_s": rate, "difference": difference, "ways_us": ways_us}


def in_pools(part: Part, pairs: Sequence[tuple[str, str]], way: str) -> None:
    """Start processes if something of theirs is missing, and measure it."""
    cells: dict[tuple[str, str], list[int]] = {}
    for pair in pairs:
        for num in sizes_of(part, *pair)[1]:
            if not part.is_done([key_of(*pair, way, num)]):
                cells.setdefault(pair, []).append(num)
    if part.processes and cells:
        num = min(max(max(numbers) for numbers in cells.values()), part.processes)
        with paper.pool_of(way, num) as pool:
            if pool is not None:
                in_pool(part, pool, cells, way)


def in_pool(
    part: Part,
    pool: paper.Pool,
    cells: Mapping[tuple[str, str], Sequence[int]],
    way: str,
) -> None:
    """Time products of processes."""
    repeat = steps_of(part)
    for (shape, dtype), numbers in cells.items():
        of_arrays, precision = DTYPES[dtype]
        what = {"scale": part.scale, "dtype": of_arrays}
        what |= {"precision": precision, "repeat": repeat}
        measure = functools.partial(in_processes, part, pool, shape, what, {})
        for num in numbers:
            key = key_of(shape, dtype, way, num)
            part.measure(key, functools.partial(measure, num))


def in_processes(
    part: Part,
    pool: paper.Pool,
    shape: str,
    what: Mapping[str, Any],
    loaded: dict[int, dict[str, Any]],
    num: int,
) -> dict[str, Any]:
    """Time R products of processes; those that have one each are loaded once."""
    each = -(-num // len(pool))
    if each not in loaded:
        loaded.clear()
        members = [(shape, i) for i in range(num if each > 1 else len(pool))]
        loaded[each] = paper.load(pool, members, what)
    used = min(num, len(pool))
    seconds = part.seconds * (1 if part.is_small else IN_PROCESSES_S)
    tenants = paper.run(pool, used, seconds, IN_FLIGHT)
    rate = what["repeat"] * paper.per_s(tenants, seconds)
    return {"per_s": rate, **paper.part_of(loaded[each], used)}


def run(part: Part) -> None:
    """Measure what is missing, print the tables."""
    print(f"products; {part.records.path}")
    repeat = steps_of(part)
    ordered = pairs_of(part)
    for shape, dtype in ordered:
        part.measure(
            key_of(shape, dtype, "in turn", 1),
            functools.partial(in_turn, part, shape, dtype, repeat),
        )
        for num in sizes_of(part, shape, dtype)[0]:
            part.measure(
                key_of(shape, dtype, "space-time", num),
                functools.partial(space_time, part, shape, dtype, num, repeat),
            )
    for way in ("space", "time"):
        in_pools(part, ordered, way)
    sawtooth(part, repeat)
    for shape, dtype in ordered:
        print_table(part, shape, dtype)
    paper.check(part)


def sawtooth(part: Part, repeat: int) -> None:
    """Measure more R, if time is left: throughput saws with waves of thread blocks."""
    for num in () if part.is_small else SAWTOOTH:
        part.measure(
            key_of("conv2_2", "float32", "space-time", num),
            functools.partial(space_time, part, "conv2_2", "float32", num, repeat),
        )


def rates(
    rows: Sequence[Mapping[str, Any]], shape: str, dtype: str, scale: str = "full"
) -> dict[str, dict[int, float]]:
    """Return products per second by way and R."""
    found: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    of = {"part": "gemm", "shape": shape, "dtype": dtype, "scale": scale}
    for row in rows:
        key = row["key"]
        if all(key.get(name) == value for name, value in of.items()):
            found[key["way"]][key["R"]] = row["values"]["per_s"]
    alone = found["in turn"].get(1)
    if alone is not None:  # one after the other, in a loop: the same rate at any R
        found["in turn"] = dict.fromkeys(found["space-time"], alone)
    return {way: dict(sorted(each.items())) for way, each in found.items()}


def geometric_mean(
    ours: Mapping[int, float], theirs: Mapping[int, float], least: int = 1
) -> float:
    """Return the mean ratio over all R that both have, from some R on; NaN if none."""
    both = [num for num in ours if num in theirs and num >= least]
    if not both:
        return float("nan")
    return float(np.exp(np.mean([np.log(ours[n] / theirs[n]) for n in both])))


def mean_over_every(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    """Return the geometric mean ratio over every R from the least to the most of both.

    Between the R that were measured, logarithms of rates lie on lines. So the many
    large R count as in the paper, which measured all of them; NaN without two.
    """
    first = max(min(ours, default=1), min(theirs, default=1))
    last = min(max(ours, default=0), max(theirs, default=0))
    if last <= first:
        return float("nan")
    numbers = np.arange(first, last + 1)

    def logs(rates: Mapping[int, float]) -> np.ndarray:
        known = sorted(rates)
        return np.interp(numbers, known, np.log([rates[n] for n in known]))

    return float(np.exp(np.mean(logs(ours) - logs(theirs))))


def break_even(ours: Mapping[int, float], theirs: Mapping[int, float]) -> int | None:
    """Return the least R from which on ours is never slower; None if there is none."""
    both = sorted(num for num in ours if num in theirs)
    slower = [num for num in both if ours[num] < theirs[num]]
    after = [num for num in both if not slower or num > max(slower)]
    return after[0] if after else None


def print_table(part: Part, shape: str, dtype: str) -> None:
    """Print products per second, and space-time's ratios."""
    found = rates(part.records.here(), shape, dtype, part.scale)
    ours = found["space-time"]
    if not ours:
        return
    config = workloads.make_paper_workloads(jnp.float32, is_small=part.is_small)[shape]
    m, k, n = config.config
    flops = 2 * m * k * n
    print(f"\n{shape} {n}x{m}x{k}, {dtype}: 1,000 products/s (TFLOP/s of space-time)")
    print(f"{'R':>5}" + "".join(f"{way:>13}" for way in WAYS) + f"{'TFLOP/s':>10}")
    shown = {num for numbers in sizes_of(part, shape, dtype) for num in numbers}
    for num in sorted(shown & {*ours}):
        cells = (found[way].get(num) for way in WAYS)
        text = "".join(f"{x / 1e3:13,.1f}" if x else f"{'-':>13}" for x in cells)
        mark = "  <- Table 1" if num in (10, 20) else ""
        print(f"{num:5}{text}{ours[num] * flops / 1e12:10.2f}{mark}")
    for way in (way for way in WAYS[1:] if found[way]):
        over = [geometric_mean(ours, found[way], least) for least in (2, 1)]
        even = break_even(ours, found[way])
        told = (
            f", the paper's {PAPER[way]}" if shape == "conv2_2" and way in PAPER else ""
        )
        means = f"{over[0]:.2f}x for R >= 2, {over[1]:.2f}x over these R, "
        every = mean_over_every(ours, found[way])
        means += f"{every:.2f}x over every R between{told}"
        print(f"  over {way}: {means}; never slower from R = {even} on")
