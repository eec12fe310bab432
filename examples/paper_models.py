"""Whole models, each way to share a device: throughput, latency, memory, energy.

    exclusive      one model, its batch R: what the paper calls the ideal
    in turn        one process, one jit after the other
    space-time     one fused step
    time           processes that take turns
    space          processes under CUDA MPS, of one and of several launches in flight
    torch streams  a CUDA graph per model, each on a stream of its own
    torch vmap     torch.func under torch.vmap, compiled

Latency is of a launch with nothing else in flight in its process; throughput is the
best of three windows, with `IN_FLIGHT` launches, of processes with each number of
`IN_FLIGHT_OF_PROCESS`: what a host that others use loses is nobody's figure.
"""

import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import stfuse
from examples import paper, workloads
from examples.paper import Part
from examples.paper_worker import make_models
from examples.workloads import Workload

Member = tuple[str, int]  # workload, number
MODELS = ("minilm", "resnet50", "mobilenet_v2", "lstm", "bert", "resnet18")
REPLICAS = (1, 4, 16, 64)
MOST = {"minilm": 64, "lstm": 64}  # replicas; 16 of the others
IN_PROCESS = ("space-time", "in turn", "exclusive", "torch streams", "torch vmap")
IN_FLIGHT = 4
IN_FLIGHT_OF_PROCESS = (1, IN_FLIGHT, 8)
WINDOWS = len(IN_FLIGHT_OF_PROCESS)  # of each way the best of so many counts
LEAST_MAPPED = 16  # models, of PyTorch's compiled vmap
RIVALS = ("time", "space", "in turn", "torch streams", "torch vmap")
_GIB = 2**30


@functools.cache
def known(dtype: str, scale: str) -> dict[str, Workload]:
    """Return the workloads; once, so that equal models have one function."""
    return workloads.make_paper_workloads(dtype, is_small=scale == "small")


def dtype_here() -> str:
    """Return what models compute in: bfloat16 on a GPU."""
    return workloads.choose_dtype("auto")


@functools.lru_cache(maxsize=1)
def models_of(members: tuple[Member, ...], scale: str) -> list[tuple[Any, ...]]:
    """Return name, workload, weights and inputs (on the host) of some models."""
    found, dtype = [], dtype_here()
    for name in dict.fromkeys(name for name, _ in members):
        workload = known(dtype, scale)[name]
        own = [number for of, number in members if of == name]
        for each in make_models(workload, own[0], len(own), dtype):
            found.append((each[0], workload, *each[1:]))
    return found


def work_of(members: Sequence[Member], scale: str) -> dict[str, float]:
    """Return the arithmetic, and the bytes of weights read, of a request of each."""
    each = [_work_of_one(name, scale) for name, _ in members]
    flops, read_bytes = map(sum, zip(*each, strict=True))
    return {"flops": flops, "read_bytes": read_bytes}


@functools.cache
def _work_of_one(name: str, scale: str) -> tuple[float, float]:
    ((of, workload, params, x),) = models_of(((name, 0),), scale)
    fused = stfuse.fuse([stfuse.Job(of, workload.apply_fn, params, x)])
    flops = workloads.true_flops(fused.plan.to_dict())
    return flops, float(workloads.used_bytes(workload, params))


def in_turn_run(models: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """Return what calls each model's jit."""
    fns = {workload.name: jax.jit(workload.apply_fn) for _, workload, *_ in models}
    calls = [
        functools.partial(fns[workload.name], params, jax.device_put(x))
        for _, workload, params, x in models
    ]
    return lambda: [call() for call in calls]


def exclusive_run(models: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """Return what runs the first model on as many rows as there are models."""
    _, workload, params, x = models[0]
    rows = jax.tree.map(lambda a: np.repeat(a, len(models), axis=0), x)
    return functools.partial(jax.jit(workload.apply_fn), params, jax.device_put(rows))


def in_process(part: Part, members: Sequence[Member], way: str) -> dict[str, Any]:
    """Measure a way that needs one process."""
    models = models_of(tuple(members), part.scale)
    if way.startswith("torch"):
        return in_torch(part, models, way)
    alone = workloads.answers_alone(
        [stfuse.Job(name, w.apply_fn, params, x) for name, w, params, x in models],
        {name: x for name, _, _, x in models},
    )
    before = bytes_in_use()
    if way == "space-time":
        jobs = [
            stfuse.Job(name, w.apply_fn, params, x) for name, w, params, x in models
        ]
        fused = stfuse.fuse(jobs)
        inputs = {name: x for name, _, _, x in models}
        run = workloads.fused_run(fused, fused.pack(), inputs)
        answers = fused.split(run())
    elif way == "exclusive":
        run = exclusive_run(models)
        name = models[0][0]
        answers = {name: jax.tree.map(lambda a: a[:1], run())}
    else:
        run = in_turn_run(models)
        names = [name for name, *_ in models]
        answers = dict(zip(names, run(), strict=True))
    difference, _ = workloads.differences(jax.device_get(answers), alone)
    held = {"bytes": None, "difference": difference}
    if (after := bytes_in_use()) is not None and before is not None:
        # A fused step has weights of its own; the others run on those drawn before.
        drawn = models if way == "in turn" else models[: way == "exclusive"]
        held["bytes"] = after - before + sum(x.nbytes for x in leaves_of(drawn))
    return timed(part, run, len(models)) | held


def bytes_in_use() -> int | None:
    """Return what this process holds on the device; None if JAX does not tell."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")


def leaves_of(models: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return the weights of some models."""
    return jax.tree.leaves([params for _, _, params, _ in models])


def in_torch(part: Part, models: Sequence[tuple[Any, ...]], way: str) -> dict[str, Any]:
    """Measure one of PyTorch's rivals; an empty row says that it cannot run here."""
    try:
        import torch

        from examples import torch_rivals
    except ImportError:
        return {}
    if not torch_rivals.is_usable():
        return {}
    gc.collect()  # what other ways of it held, in cycles
    before = torch.cuda.memory_allocated()
    members = [workload for _, workload, *_ in models]
    runs = torch_rivals.make_runs(members, dtype_here(), [way])
    if way not in runs:
        return {}
    held = torch.cuda.memory_allocated() - before
    # What an earlier way held may be freed meanwhile: then nothing is known.
    return timed(part, runs[way], len(models)) | {"bytes": held if held > 0 else None}


def timed(part: Part, run: Callable[[], Any], num_requests: int) -> dict[str, Any]:
    """Time a step: alone for its latency, in flight for throughput and energy."""
    jax.block_until_ready(run())
    jax.block_until_ready(run())
    latency = paper.closed_loop(run, part.seconds, 1)
    with paper.Power() as power:
        busy = [paper.closed_loop(run, part.seconds, IN_FLIGHT) for _ in range(WINDOWS)]
    rate = num_requests * max(paper.per_s(each, part.seconds) for each in busy)
    return summary(rate, paper.latencies_s(latency), power.watts)


def summary(
    per_s: float, latencies_s: np.ndarray, watts: float | None
) -> dict[str, Any]:
    """Return requests per second, milliseconds, and joules per request."""
    p50, p99 = 1e3 * np.percentile(latencies_s, [50, 99])
    found = {"per_s": per_s, "p50_ms": float(p50), "p99_ms": float(p99)}
    return found | ({"joules": watts / per_s} if watts else {})


def hold(
    part: Part, pool: paper.Pool, members: Sequence[Member], processes: int
) -> dict[str, Any]:
    """Give models to processes; see `paper.load`."""
    what = {"scale": part.scale, "dtype": dtype_here(), "repeat": 1}
    what["precision"] = "highest" if what["dtype"] == "float32" else "default"
    return paper.load(pool, members, what, processes)


def in_pool(part: Part, pool: paper.Pool, held: Mapping[str, Any]) -> dict[str, Any]:
    """Measure processes that hold models, at one and several launches in flight."""
    found = {}
    for in_flight in IN_FLIGHT_OF_PROCESS:
        with paper.Power() as power:
            tenants = paper.run(pool, held["processes"], part.seconds, in_flight)
        rate = paper.per_s(tenants, part.seconds)
        own = summary(rate, paper.latencies_s(tenants), power.watts)
        own["fastest_over_slowest"] = spread(tenants)
        found[f"{in_flight} in flight"] = own
    best = max(found.values(), key=lambda each: each["per_s"])
    return {**found["1 in flight"], **held, "ways": found, "per_s": best["per_s"]}


def spread(tenants: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how many times as many launches the fastest did as the slowest."""
    nums = [len(tenant["done_s"]) for tenant in tenants]
    return max(nums) / min(nums) if min(nums) else None


def processes_of(part: Part, num: int) -> list[int]:
    """Return the numbers of processes to try for some models; the best counts."""
    most = min(num, part.processes)
    return sorted({most} | {p for p in (8, 16, 32) if num >= 64 and p < most})


def sets_of(part: Part) -> list[tuple[str, int]]:
    """Return workloads and replicas, the README's first."""
    if part.is_small:
        return [("minilm", 2), ("lstm", 1)]
    first = [(name, 16) for name in MODELS]
    first.insert(3, ("minilm", 64))
    rest = [(name, n) for n in REPLICAS for name in MODELS if n <= MOST.get(name, 16)]
    return [*first, *(pair for pair in rest if pair not in first)]


def ways_of(num: int) -> tuple[str, ...]:
    """Return the ways in one process to run so many equal models.

    One model is alone whoever calls it; PyTorch compiles few mapped ones for as long
    as many.
    """
    left_out = {"exclusive"} if num == 1 else set()
    left_out |= {"torch vmap"} if num < LEAST_MAPPED else set()
    return tuple(way for way in IN_PROCESS if way not in left_out)


def run(part: Part) -> None:
    """Measure what is missing, print the tables."""
    print(f"models; {part.records.path}")
    sets = []
    for name, num in sets_of(part):
        key = {"part": "models", "model": name, "R": num}
        sets.append((key, [(name, i) for i in range(num)]))
    first, rest = sets[: len(MODELS) + 1], sets[len(MODELS) + 1 :]
    for some in (first, rest):
        for key, members in some:
            in_one(part, key, members, ways_of(len(members)))
        if some is first:  # processes that have sixteen models can run one or four
            in_pools(part, sets)
    for key, _ in sets:
        print_table(part, key)
    paper.check(part)


def in_one(
    part: Part, key: Mapping[str, Any], members: Sequence[Member], ways: Sequence[str]
) -> None:
    """Measure a set of models in this process, each way."""
    of = functools.partial(work_of, members, part.scale)
    part.measure({**key, "way": "work"}, of)
    for way in ways:
        one = functools.partial(in_process, part, members, way)
        part.measure({**key, "way": way}, one)
    models_of.cache_clear()


def in_pools(
    part: Part, sets: Sequence[tuple[Mapping[str, Any], Sequence[Member]]]
) -> None:
    """Measure sets of models in processes, which are slow to start.

    Where each has one model, the largest set of some kind is loaded, and the first of
    its processes run the others.

    Args:
        part: where to keep it.
        sets: keys and members.
    """
    for way in ("space", "time"):
        loads: dict[Any, list[tuple[int, Sequence[Member], Mapping[str, Any]]]] = {}
        for key, members in sets if part.processes else ():
            for num in processes_of(part, len(members)):
                cell = {**key, "way": way, "processes": num}
                if not part.is_done([cell]):
                    together = members[0] if num == len(members) else (num, *members)
                    loads.setdefault(together, []).append((num, members, cell))
        if not loads:
            continue
        most = max(num for cells in loads.values() for num, *_ in cells)
        with paper.pool_of(way, most) as pool:
            for cells in loads.values() if pool is not None else ():
                num, members, _ = max(cells, key=lambda cell: cell[0])
                of_all = functools.partial(hold, part, pool, members, num)
                in_pool_of(part, pool, functools.cache(of_all), cells)


def in_pool_of(
    part: Part,
    pool: paper.Pool,
    held: Callable[[], Mapping[str, Any]],
    cells: Sequence[tuple[int, Sequence[Member], Mapping[str, Any]]],
) -> None:
    """Measure processes that hold models, as many of them as each cell says.

    Args:
        part: where to keep it.
        pool: the processes.
        held: loads the models, once, and tells what `hold` does.
        cells: the number of processes, their members, and the key of each.
    """

    def measure(num: int) -> dict[str, Any]:
        return in_pool(part, pool, paper.part_of(held(), num))

    for num, _, key in cells:
        part.measure(key, functools.partial(measure, num))


def best_of(part: Part, key: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by way the values of a set of models, the best number of processes."""
    found: dict[str, dict[str, Any]] = {}
    for row in part.records.here():
        own, values = dict(row["key"]), row["values"]
        way = own.pop("way")
        own.pop("processes", None)
        if own == {**key, "scale": part.scale} and values:
            old = found.get(way)
            if old is None or values.get("per_s", 0) > old["per_s"]:
                found[way] = values
    return found


def print_table(part: Part, key: Mapping[str, Any]) -> None:
    """Print one set of models: a line per way, best arrangement each."""
    found = best_of(part, key)
    work, ours = found.pop("work", None), found.get("space-time")
    if work is None or ours is None:
        return
    print(f"\n{' '.join(str(value) for value in key.values())}")
    print(
        f"  {'way':15}{'requests/s':>12}{'times less':>12}{'p50 ms':>9}{'p99':>9}"
        f"{'TFLOP/s':>9}{'TB/s':>7}{'GiB':>7}{'mJ':>8}  processes"
    )
    num = key.get("R") or key["models"]
    for way, values in found.items():
        per_model = values["per_s"] / num
        cells = f"{values['per_s']:12,.0f}{ours['per_s'] / values['per_s']:11.2f}x"
        cells += f"{values['p50_ms']:9.3f}{values['p99_ms']:9.3f}"
        cells += f"{per_model * work['flops'] / 1e12:9.2f}"
        cells += f"{per_model * work['read_bytes'] / 1e12:7.2f}"
        held, joules = values.get("bytes"), values.get("joules")
        cells += f"{held / _GIB:7.1f}" if held else f"{'-':>7}"
        cells += f"{1e3 * joules:8.2f}" if joules else f"{'-':>8}"
        print(f"  {way:15}{cells}  {values.get('processes', '')}")
