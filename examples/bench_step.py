"""Time one step of N equal models, fused and by each rival, as N grows.

Rivals, each with weights and inputs that already are on the device:

    in turn        one jax.jit, called for one model after the other
    jit(vmap)      jax.jit(jax.vmap(apply_fn)) over the stacked weights
    native         stfuse.fuse(..., lowering="native"): each primitive mapped as it is
    auto           stfuse.fuse(..., lowering="auto")
    torch streams  with --torch: a CUDA graph per model, each on a stream of its own
    torch vmap     with --torch: functional_call, vmap and torch.compile

Latency waits for every call; pipelined keeps all calls of a round in flight, and waits
for the last. A figure is a median over rounds in which the rivals take turns. The floor
is what parameters take to be read once, or what the arithmetic takes, whichever is
longer; the rates achieved are those of ``auto`` over the same bytes and arithmetic.
Before timing, each fused answer is compared with its model alone: exit 1 if one
differs.
"""

import collections
import functools
import gzip
import importlib.util
import json
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging

import stfuse
from examples import workloads
from examples.workloads import Run, Workload

RIVALS = ("in turn", "jit(vmap)", "native", "auto")

_WORKLOADS = flags.DEFINE_list("workloads", [], "Which; all if empty.")
_JOBS = flags.DEFINE_list(
    "jobs", [], "Numbers of models; if empty, powers of two up to 16 or 64."
)
_SCALE = flags.DEFINE_enum("scale", "full", ["full", "small"], "Of the models.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "auto: bfloat16 on a GPU."
)
_RIVALS = flags.DEFINE_list("rivals", list(RIVALS), "Which; auto is always there.")
_TORCH = flags.DEFINE_bool("torch", False, "Time PyTorch on a GPU too.")
_CALLS = flags.DEFINE_integer("calls", 20, "Per rival and round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Medians are over these.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 0.3, "Fewer calls if they take longer.")
_COST = flags.DEFINE_string("cost", "auto", "The planner's record of the device.")
_PROFILE = flags.DEFINE_bool("profile", False, "List the kernels of auto; on a GPU.")
_SAVE = flags.DEFINE_string("save", None, "Where to write raw numbers, as JSON.")
_PLOT = flags.DEFINE_string("plot", None, "Where to draw jobs/s against N.")


@functools.cache
def find_torch() -> Any:
    """Return `torch_rivals` if it is asked for and can run; else say once why not."""
    if not _TORCH.value:
        return None
    try:
        from examples import torch_rivals  # PyTorch is no dependency of this project
    except ImportError as error:
        print(f"--torch: its rivals are left out: {error}")
        return None
    if torch_rivals.is_usable():
        return torch_rivals
    print("--torch: its rivals are left out: PyTorch finds no GPU")
    return None


def stack_params(all_params: Sequence[Any]) -> Any:
    """Return pytrees of equal shapes as one, ``[N, ...]``; compiles one small write."""

    @functools.partial(jax.jit, donate_argnums=0)
    def write(stack: Any, own: Any, i: Any) -> Any:
        return jax.tree.map(lambda s, a: s.at[i].set(a), stack, own)

    num = len(all_params)
    stack = jax.tree.map(lambda a: jnp.zeros((num, *a.shape), a.dtype), all_params[0])
    for i, own in enumerate(all_params):
        stack = write(stack, own, i)
    return stack


def in_turn_run(jobs: Sequence[stfuse.Job], inputs: Mapping[str, Any]) -> Run:
    """Return what calls each model's jit; equal models have one."""
    fns = {job.apply_fn: jax.jit(job.apply_fn) for job in jobs}
    staged = jax.device_put([inputs[job.name] for job in jobs])
    calls = [
        functools.partial(fns[job.apply_fn], job.params, x)
        for job, x in zip(jobs, staged, strict=True)
    ]
    return lambda: [call() for call in calls]


def vmap_run(jobs: Sequence[stfuse.Job], inputs: Mapping[str, Any]) -> Run:
    """Return what runs all equal models as one mapped function."""
    stack = stack_params([job.params for job in jobs])
    own = [inputs[job.name] for job in jobs]
    staged = jax.tree.map(lambda *xs: jnp.stack(xs), *own)
    return functools.partial(jax.jit(jax.vmap(jobs[0].apply_fn)), stack, staged)


def make_runs(
    workload: Workload, jobs: Sequence[stfuse.Job], inputs: Mapping[str, Any]
) -> tuple[dict[str, Run], dict[str, stfuse.Fused]]:
    """Return what each rival runs per call, and the fused ones among them."""
    runs, fuseds = {}, {}
    wanted = {*_RIVALS.value, "auto"}
    if "in turn" in wanted:
        runs["in turn"] = in_turn_run(jobs, inputs)
    if "jit(vmap)" in wanted:
        runs["jit(vmap)"] = vmap_run(jobs, inputs)
    for lowering in sorted({"native", "auto"} & wanted, reverse=True):
        fused = stfuse.fuse(jobs, lowering=lowering, cost=_COST.value)
        runs[lowering] = workloads.fused_run(fused, fused.pack(), inputs)
        fuseds[lowering] = fused
    if torch_rivals := find_torch():
        dtype = workloads.dtype_of(jobs[0])
        runs |= torch_rivals.make_runs([workload] * len(jobs), dtype)
    return runs, fuseds


def measure(
    workload: Workload,
    jobs: Sequence[stfuse.Job],
    inputs: Mapping[str, Any],
    alone: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that is known of one number of models, as plain numbers and lists."""
    runs, fuseds = make_runs(workload, jobs, inputs)
    compile_s, answers = workloads.warm_up(runs)
    found = [
        workloads.differences(fused.split(answers[name]), alone)
        for name, fused in fuseds.items()
    ]
    plan = fuseds["auto"].plan.to_dict()
    num_bytes = sum(workloads.used_bytes(workload, job.params) for job in jobs)
    difference, whose = max(found)
    is_profiled = _PROFILE.value and jax.default_backend() == "gpu"
    times = workloads.times_us(
        runs,
        num_calls=_CALLS.value,
        num_rounds=_ROUNDS.value,
        most_s=_SECONDS.value,
    )
    return {
        "times_us": times,
        "medians_us": workloads.medians(times),
        "compile_s": compile_s,
        "difference": difference,
        "differs_most": whose,
        "num_bytes": num_bytes,
        "flops": workloads.true_flops(plan),
        "floor_us": workloads.floor_us(num_bytes, workloads.true_flops(plan)),
        "lowerings": workloads.lowerings(plan),
        "kernels": profile(runs["auto"]) if is_profiled else [],
    }


def profile(run: Run, num_calls: int = 5, most: int = 12) -> list[Any]:
    """Return the kernels that take most of a call: name, microseconds, how often.

    A trace is taken without CUDA graphs: its sum is not the time of a step.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([run() for _ in range(num_calls)])
        path = max(pathlib.Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    total_us, count = kernel_times(events)
    found = [
        (name, us / num_calls, count[name] / num_calls)
        for name, us in total_us.most_common(most)
    ]
    rest_us = sum(total_us.values()) / num_calls - sum(us for _, us, _ in found)
    rest = sum(count.values()) / num_calls - sum(n for _, _, n in found)
    return [*found, ("all others", rest_us, rest)]


def kernel_times(
    events: Sequence[Mapping[str, Any]],
) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Return microseconds and occurrences of each kernel on the streams of a GPU."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"].get("name", "")
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"].get("name", "")
    total_us, count = collections.Counter(), collections.Counter()
    for event in events:
        where = event.get("pid"), event.get("tid")
        is_kernel = event.get("ph") == "X" and "GPU" in processes.get(where[0], "")
        if is_kernel and "Stream" in threads.get(where, ""):
            total_us[event["name"]] += event["dur"]
            count[event["name"]] += 1
    return total_us, count


def print_record(num_jobs: int, record: Mapping[str, Any]) -> None:
    """Print one number of models: a line of heads, then one per way of waiting."""
    floor, compile_s = record["floor_us"], record["compile_s"]
    took = ", ".join(f"{name} {s:.1f}" for name, s in compile_s.items())
    ways = ", ".join(f"{n} {way}" for way, n in record["lowerings"].items())
    print(f"  N={num_jobs}: difference {record['difference']:.1e}; {ways}")
    print(f"  first call, s: {took}")
    heads = "".join(f"{name:>17}" for name in compile_s)
    rates = f"{'floor':>9}{'/floor':>8}{'TB/s':>8}{'TFLOP/s':>9}"
    print(f"  {'N':>3} {'way':10}{heads}{rates}")
    for way, us in record["medians_us"].items():
        auto = us["auto"]
        cells = "".join(f"{t:10.1f} {t / auto:5.2f}x" for t in us.values())
        floors = f"{floor:9.1f}{auto / floor:7.2f}x" if floor else f"{'-':>9}{'-':>8}"
        rates = f"{record['num_bytes'] / auto / 1e6:8.3f}"
        rates += f"{record['flops'] / auto / 1e6:9.2f}"
        print(f"  {num_jobs:3} {way:10}{cells}{floors}{rates}", flush=True)
    for name, us, count in record["kernels"]:
        print(f"    {us:9.1f} us {count:6.1f}x {name[:80]}", flush=True)


def measure_workload(
    workload: Workload, dtype: str, records: dict[str, Any], save: Any
) -> None:
    """Measure and print each number of models, and save after each."""
    powers = [2**i for i in range(workload.most_jobs.bit_length())]
    numbers = [int(text) for text in _JOBS.value] or powers
    jobs, inputs = workloads.make_jobs(workload, max(numbers), jnp.dtype(dtype))
    start_s = time.perf_counter()
    alone = workloads.answers_alone(jobs, inputs)
    alone_s = time.perf_counter() - start_s
    read = workloads.used_bytes(workload, jobs[0].params) / 1e6
    print(
        f"\n{workload.name}: a request reads {read:.3f} MB of parameters; {len(jobs)}"
    )
    print(f"  models alone: compiled and run in {alone_s:.1f} s", flush=True)
    for num_jobs in numbers:
        some = jobs[:num_jobs]
        own = {job.name: inputs[job.name] for job in some}
        records[str(num_jobs)] = measure(workload, some, own, alone)
        print_record(num_jobs, records[str(num_jobs)])
        save()


def plot(path: str, title: str, all_records: Mapping[str, Any]) -> None:
    """Draw jobs per second, pipelined, against N: a panel per workload."""
    from matplotlib.figure import Figure  # needs no screen

    num = len(all_records)
    figure = Figure(figsize=(4 * min(num, 4), 3.4 * -(-num // 4)), layout="constrained")
    for i, (workload, records) in enumerate(all_records.items()):
        axes = figure.add_subplot(-(-num // 4), min(num, 4), i + 1)
        numbers = sorted(map(int, records))
        for name in records[str(numbers[0])]["compile_s"]:
            us = [records[str(n)]["medians_us"]["pipelined"].get(name) for n in numbers]
            rates = [
                1e6 * n / t if t else None for n, t in zip(numbers, us, strict=True)
            ]
            axes.plot(numbers, rates, marker="o", label=name)
        floors = [records[str(n)]["floor_us"] for n in numbers]
        if all(floors):
            rates = [1e6 * n / t for n, t in zip(numbers, floors, strict=True)]
            axes.plot(numbers, rates, "k--", label="floor")
        axes.set(title=workload, xscale="log", yscale="log", xlabel="models, N")
        axes.set_xticks(numbers, numbers, minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("answers per second")
    figure.axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def check_flags(known: Mapping[str, Any]) -> None:
    """Refuse what would fail after minutes of measuring.

    Raises:
        UsageError: naming the flag.
    """
    if unknown := sorted({*_WORKLOADS.value} - {*known}):
        there = ", ".join(known)
        raise app.UsageError(f"--workloads: no {unknown}; there are {there}")
    if unknown := sorted({*_RIVALS.value} - {*RIVALS}):
        raise app.UsageError(f"--rivals: no {unknown}; there are {', '.join(RIVALS)}")
    if not all(text.isdecimal() and int(text) for text in _JOBS.value):
        raise app.UsageError(f"--jobs: found {_JOBS.value}; pass numbers of models")
    if _PLOT.value and not importlib.util.find_spec("matplotlib"):
        raise app.UsageError("--plot: matplotlib is missing; pip install matplotlib")


def main(_: list[str]) -> None:
    """Measure each workload, and fail if an answer is not its model's."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    dtype, is_small = workloads.choose_dtype(_DTYPE.value), _SCALE.value == "small"
    known = workloads.make_workloads(jnp.dtype(dtype).type, is_small=is_small)
    check_flags(known)
    kind = jax.devices()[0].device_kind
    title = f"{kind}, jax {jax.__version__}, {dtype}, {_SCALE.value}"
    print(f"{title}; us of a step, and how many times as long as auto")
    if _PROFILE.value and jax.default_backend() != "gpu":
        print("--profile: there is no GPU, and so no kernels to list")
    header = {"device": kind, "jax": jax.__version__, "dtype": dtype}
    header |= {"scale": _SCALE.value, "calls": _CALLS.value, "rounds": _ROUNDS.value}
    all_records: dict[str, Any] = {}

    def save() -> None:
        """Write what was measured so far: it stays if what follows fails."""
        if _SAVE.value:
            text = json.dumps({**header, "workloads": all_records})
            pathlib.Path(_SAVE.value).write_text(text)

    for name in _WORKLOADS.value or known:
        records = all_records[name] = {}
        measure_workload(known[name], dtype, records, save)
    if _PLOT.value:
        plot(_PLOT.value, title, all_records)
    wrong = [
        f"{name} at {n}"
        for name, records in all_records.items()
        for n, record in records.items()
        if not record["difference"] <= workloads.TOLERANCE[dtype]
    ]
    if wrong:
        raise SystemExit(f"an answer is not its model's own: {', '.join(wrong)}")


if __name__ == "__main__":
    app.run(main)
