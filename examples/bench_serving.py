"""Serve many tenants under open-loop load: what policies bear, and what they promise.

    sweep      per policy: the capacity (a closed loop), then Poisson or Gamma arrivals
               of equal or Zipf tenants at 0.1 to 10 times that
    step       space-time saturated against its own bare step in a loop, and p99 at 70%
               load in step times
    isolation  p99 of well-behaved tenants beside an abusive one (10 shares) over their
               p99 beside a peaceful one, with deadlines and without
    join       p99 of the others while a tenant is added over before: into a free slot,
               and into a lane that must grow for it, or gets another program
    loadgen    per policy: the largest rate that MLPerf's LoadGen calls valid

Latency counts from the intended send time; warm-up is not counted. good/s is what was
answered within the deadline; shed is what was refused or expired, late what was
answered too late, unsent what a lagging sender had no time left for; lag is how late
the 99th percentile was sent. Every answer is compared with its model alone after
timing: exit 1 if one differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import stfuse
from examples import fleet as fleets
from examples import goals, load, loadgen, records, streams, workloads
from examples.fleet import Fleet

POLICIES = ("exclusive", "time", "space-time")
MEASURES = ("sweep", "step", "isolation", "join", "loadgen")

_SCALE = flags.DEFINE_enum("scale", "full", ["full", "small"], "Of the models.")
_WORKLOAD = flags.DEFINE_string("workload", "minilm", "What all tenants run.")
_NEWCOMER = flags.DEFINE_string("newcomer", None, "A full lane's newcomer's workload.")
_TENANTS = flags.DEFINE_integer("tenants", None, "64 or, if small, 8.", lower_bound=2)
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "auto: bfloat16 on a GPU."
)
_POLICIES = flags.DEFINE_multi_enum(
    "policy", list(POLICIES), POLICIES, "Which; may be given several times."
)
_MEASURES = flags.DEFINE_list("measure", list(MEASURES[:-1]), f"Of {MEASURES}.")
_LOADS = flags.DEFINE_list(
    "loads", ["0.1", "0.3", "0.7", "1", "2", "10"], "Times the capacity."
)
_SECONDS = flags.DEFINE_float(
    "seconds", None, "Of each load; a third is warm-up. 1.5 or, if small, 0.7."
)
_JOIN_SECONDS = flags.DEFINE_float(
    "join_seconds", None, "That a full lane's newcomer has; many times if not given."
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Of the isolation cases.", lower_bound=1)
_DEADLINE_MS = flags.DEFINE_float("deadline_ms", 20.0, "From the intended send time.")
_CV = flags.DEFINE_float("cv", 1.0, "Of the gaps: 1 is Poisson, above is bursty.")
_ZIPF = flags.DEFINE_float("zipf", 1.0, "Exponent over tenants; 0 makes them equal.")
_MAX_BATCH_SIZE = flags.DEFINE_integer("max_batch_size", 4, "Of the engines.")
_ROWS = flags.DEFINE_integer("rows", 1, "Of a request.", lower_bound=1)
_SWITCH_MS = flags.DEFINE_float(
    "switch_ms", None, "The engines' switch_interval_s, in ms; their own if not given."
)
_DELAY_MS = flags.DEFINE_float("max_queue_delay_ms", 0.0, "Of the engines, in ms.")
_STRICT_SHARES = flags.DEFINE_bool("strict_shares", False, "Of the engines.")
_SEARCH_STEPS = flags.DEFINE_integer("search_steps", 7, "LoadGen runs per policy.")
_SEED = flags.DEFINE_integer("seed", 0, "Of all streams.")
_SAVE = flags.DEFINE_string("save", None, "Where to write raw numbers, as JSON.")
_PLOT = flags.DEFINE_string("plot", None, "Where to draw goodput and p99 against load.")


class Answers:
    """Remembers how far any answer was from its model alone.

    Attributes:
        num: answers compared.
        worst: the largest relative difference.
    """

    def __init__(self) -> None:
        """Start with nothing compared."""
        self.num, self.worst = 0, 0.0

    def check(self, fleet: Fleet, run: load.Run) -> None:
        """Compare all answers of a run."""
        self.num += int(run.is_answered.sum())
        self.worst = max(self.worst, fleet.check(run))


@contextlib.contextmanager
def serve(fleet: Fleet, policy: str, max_batch_size: int) -> Iterator[stfuse.Engine]:
    """Give an engine at full speed, and say how long that took."""
    start_s = time.perf_counter()
    # Requests of so many rows fill no others: each number is a compile per bucket.
    sizes = [fleet.rows << i for i in range(max_batch_size.bit_length())]
    sizes = [size for size in sizes if size <= max_batch_size]
    options = {
        "policy": policy,
        "max_batch_size": max_batch_size,
        "batch_sizes": sizes,
        "strict_shares": _STRICT_SHARES.value,
        "max_queue_delay_s": _DELAY_MS.value / 1e3,
        "switch_interval_s": _SWITCH_MS.value and _SWITCH_MS.value / 1e3,
    }
    max_slots = max(64, len(fleet.jobs))
    with fleets.serve(fleet.jobs, max_slots=max_slots, **options) as engine:
        took_s = time.perf_counter() - start_s
        compiles = engine.stats().compiles
        print(f"\n{policy}, {fleet.rows} rows a request, batches to {max_batch_size}")
        print(f"  ready in {took_s:.1f} s, {compiles} steps compiled", flush=True)
        yield engine
        print(f"  all done {time.perf_counter() - start_s:.0f} s after its start")


def print_steps(engine: stfuse.Engine) -> None:
    """Print how often each step ran so far, and its median time."""
    each = engine.stats().buckets.items()
    text = [f"{name} {1e3 * s.measured_p50_s:.2f} ({s.steps:,})" for name, s in each]
    print(f"  steps so far, ms: {', '.join(text)}", flush=True)


def options_of(fleet: Fleet, answers: Answers) -> goals.Options:
    """Return how the flags say to measure."""
    seconds = _SECONDS.value or (0.7 if _SCALE.value == "small" else 1.5)
    return goals.Options(
        seconds, seconds / 3, _SEED.value, lambda run: answers.check(fleet, run)
    )


def sweep(engine: stfuse.Engine, fleet: Fleet, options: goals.Options) -> dict:
    """Measure the capacity, then each load; print a line for each."""
    num, num_inputs = len(fleet.jobs), len(fleet.targets[0].inputs)
    deadline_s = _DEADLINE_MS.value / 1e3
    shares = streams.zipf(num, _SEED.value, _ZIPF.value)
    outstanding = goals.window(fleet, _MAX_BATCH_SIZE.value)
    run, bucket = goals.capacity(engine, fleet, shares, outstanding, options)
    rate = run.answered_per_s
    print(f"  capacity {rate:,.0f} requests/s, closed loop of {outstanding}; {bucket}")
    print(
        f"  {'load':>5}{'offered/s':>11}{'answered/s':>12}{'good/s':>10}{'shed':>7}"
        f"{'late':>7}{'unsent':>8}{'p50 ms':>9}{'p99':>8}{'p99.9':>8}{'lag':>7}"
        f"{'tenants/step':>14}"
    )
    loads = {}
    for text in _LOADS.value:
        offered, seed, cv = float(text) * rate, options.seed, _CV.value
        stream = streams.make_stream(
            offered, options.seconds, shares, num_inputs, seed, cv
        )
        before = engine.stats()
        run = load.replay(
            engine,
            fleet.targets,
            stream,
            deadline_s,
            keep_every=goals.KEEP_EVERY,
        )
        found = load.summarize(run, deadline_s, options.warm_s, options.seconds)
        per_step = goals.tenants_per_step(before, engine.stats())
        options.report(run)
        loads[text] = dataclasses.asdict(found) | {"tenants_per_step": per_step}
        print_load(text, found, per_step)
    return {"capacity_per_s": rate, "bucket": bucket, "loads": loads}


def print_load(text: str, found: load.Summary, tenants_per_step: float) -> None:
    """Print one line of a sweep."""
    print(
        f"  {text:>4}x{found.offered_per_s:11,.0f}{found.answered_per_s:12,.0f}"
        f"{found.goodput_per_s:10,.0f}{found.shed:7.1%}{found.late:7.1%}"
        f"{found.unsent:8.1%}{found.p50_ms:9.2f}{found.p99_ms:8.2f}"
        f"{found.p999_ms:8.2f}{found.lag_ms:7.2f}{tenants_per_step:14.1f}",
        flush=True,
    )


def measure_step(
    engine: stfuse.Engine, fleet: Fleet, options: goals.Options
) -> dict[str, Any]:
    """Compare an engine with its bare step, and print it."""
    outstanding = goals.window(fleet, _MAX_BATCH_SIZE.value)
    found = goals.against_bare(engine, fleet, outstanding, options)
    bare, loaded = found["bare"], found["high_load"]
    print(
        f"  saturated {found['rows_per_s']:,.0f} rows/s, bare step "
        f"{bare['slots']}x{bare['rows']} {bare['rows_per_s']:,.0f} rows/s: ratio "
        f"{found['ratio']:.2f} (goal 0.80)\n"
        f"  bare step {1e3 * bare['step_s']:.3f} ms with two in flight, "
        f"{1e3 * bare['latency_s']:.3f} ms waited for; the engine's {found['bucket']} "
        f"{1e3 * found['engine_step_s']:.3f} ms\n"
        f"  host us per step: {load.named(found['host_us'])}\n"
        f"  at 70% load p50 {loaded['p50_ms']:.2f} ms, p99 {loaded['p99_ms']:.2f} ms: "
        f"{found['p99_steps']:.1f} bare steps (goal 3.0), {found['p99_latencies']:.1f} "
        f"of those waited for; steps {load.named(found['steps'])}",
        flush=True,
    )
    return found


def measure_isolation(
    engine: stfuse.Engine, fleet: Fleet, rate: float, options: goals.Options
) -> dict[str, Any]:
    """Measure the walls with deadlines and without, and print it."""
    found = {}
    deadlines = {"with deadlines": _DEADLINE_MS.value / 1e3, "without": None}
    for name, deadline_s in deadlines.items():
        case = found[name] = goals.isolation(
            engine, fleet, rate, deadline_s, _ROUNDS.value, options
        )
        rounds = [
            abusive["others"]["p99_ms"] / peaceful["others"]["p99_ms"]
            for peaceful, abusive in zip(case["peaceful"], case["abusive"], strict=True)
        ]
        lost = max(each["others"]["shed"] for each in case["abusive"])
        lag_ms = max(each["others"]["lag_ms"] for each in case["abusive"])
        first = case["abusive"][-1]["first"]
        each = ", ".join(f"{ratio:.2f}" for ratio in rounds)
        print(
            f"  isolation {name}: others' p99 {case['peaceful_p99_ms']:.2f} ms beside "
            f"a peaceful, {case['abusive_p99_ms']:.2f} ms beside an abusive tenant: "
            f"ratio {case['ratio']:.2f} (goal 1.10; rounds {each})\n"
            f"    others shed {lost:.1%}, sent with p99 lag {lag_ms:.2f} ms; the "
            f"abusive offered "
            f"{first['offered_per_s']:,.0f}/s, {first['goodput_per_s']:,.0f}/s good, "
            f"shed {first['shed']:.1%}",
            flush=True,
        )
    return found


def measure_join(
    engine: stfuse.Engine,
    fleet: Fleet,
    newcomer: stfuse.Job,
    rate: float,
    options: goals.Options,
) -> dict[str, Any]:
    """Add a tenant to a free slot, then one for which there is none; print both."""
    num, found = len(fleet.jobs), {}
    build_s = _JOIN_SECONDS.value or options.seconds
    engine.remove(fleet.jobs[-1].name)
    cases = {
        "free slot": (fleet.first(num - 1), fleet.jobs[-1], options.seconds),
        _NEWCOMER.value or "full lane": (fleet, newcomer, build_s),
    }
    for name, (others, job, after_s) in cases.items():
        high = goals.HIGH_LOAD * rate
        # A quick join is over before there are enough requests for a percentile.
        times = 1 if after_s > options.seconds else 2 * _ROUNDS.value
        after_s = after_s if times == 1 else max(after_s / 2, 3 * goals.MIN_DURING_S)
        case = goals.joining(engine, others, job, high, after_s, options, times)
        found[name] = case
        first_s, ready_s = case["first_s"], case["ready_s"]
        took = "not ready in time" if ready_s is None else f"ready in {ready_s:.2f} s"
        if first_s is not None:
            took += f", first answer after {first_s:.2f} s"
        print(
            f"  a tenant joins, {name}: others' p99 {case['before']['p99_ms']:.2f} ms "
            f"before, {case['during']['p99_ms']:.2f} ms during {case['during_s']:.2f} "
            f"s of {times} joins: ratio {case['ratio']:.2f} (goal 1.25); {took}",
            flush=True,
        )
    return found


def measure_policy(
    policy: str, fleet: Fleet, newcomer: stfuse.Job, answers: Answers
) -> dict[str, Any]:
    """Measure what the flags ask for of one policy."""
    asked, options = {*_MEASURES.value}, options_of(fleet, answers)
    found: dict[str, Any] = {}
    with serve(fleet, policy, _MAX_BATCH_SIZE.value) as engine:
        if "sweep" in asked:
            found |= sweep(engine, fleet, options)
        outstanding = goals.window(fleet, _MAX_BATCH_SIZE.value)
        equal = np.ones(len(fleet.jobs))
        run, bucket = goals.capacity(engine, fleet, equal, outstanding, options)
        rate = found["equal_capacity_per_s"] = run.answered_per_s
        print(
            f"  capacity of equal tenants {rate:,.0f} requests/s; {bucket}", flush=True
        )
        if "loadgen" in asked:
            settings = loadgen.Settings(
                _DEADLINE_MS.value / 1e3, options.seconds, 500, _SEED.value
            )
            print("  LoadGen, Server scenario, no MLPerf results:")
            found["loadgen"] = loadgen.search_policy(
                engine, fleet, rate / 2, settings, _SEARCH_STEPS.value
            )
            answers.worst = max(answers.worst, found["loadgen"]["difference"])
        if policy == "space-time" and "step" in asked:
            found["step"] = measure_step(engine, fleet, options)
            print_steps(engine)
        if policy == "space-time" and "isolation" in asked:
            found["isolation"] = measure_isolation(engine, fleet, rate, options)
            print_steps(engine)
        if policy == "space-time" and "join" in asked:
            found["join"] = measure_join(engine, fleet, newcomer, rate, options)
    return found


def plot(path: str, title: str, policies: Mapping[str, Any]) -> None:
    """Draw goodput and p99 against offered load, a line per policy."""
    from matplotlib.figure import Figure  # needs no screen

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy, found in policies.items():
        each = found.get("loads", {}).values()
        loads = sorted(each, key=lambda x: x["offered_per_s"])
        offered = [x["offered_per_s"] for x in loads]
        goodput = [x["goodput_per_s"] for x in loads]
        left.plot(offered, goodput, marker="o", label=policy)
        right.plot(offered, [x["p99_ms"] for x in loads], marker="o", label=policy)
    left.set(ylabel="answered within the deadline, per second", yscale="log")
    right.set(ylabel="p99 of what was answered, ms", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="offered requests per second", xscale="log")
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def check_flags(known: Mapping[str, Any]) -> None:
    """Refuse what would fail after minutes of measuring.

    Raises:
        UsageError: naming the flag.
    """
    for flag in (_WORKLOAD, _NEWCOMER):
        if flag.value not in (*known, flag.default):
            there = f"there are {', '.join(known)}"
            raise app.UsageError(f"--{flag.name}: no {flag.value}; {there}")
    if unknown := sorted({*_MEASURES.value} - {*MEASURES}):
        there = ", ".join(MEASURES)
        raise app.UsageError(f"--measure: no {unknown}; there are {there}")
    if _ROWS.value > _MAX_BATCH_SIZE.value:
        most = f"at most --max_batch_size={_MAX_BATCH_SIZE.value}"
        raise app.UsageError(f"--rows: found {_ROWS.value}; pass {most}")
    try:
        are_positive = all(float(text) > 0 for text in _LOADS.value)
    except ValueError:
        are_positive = False
    if not are_positive:
        raise app.UsageError(f"--loads: found {_LOADS.value}; pass numbers above 0")
    if "loadgen" in _MEASURES.value and not loadgen.is_installed():
        raise app.UsageError(f"--measure=loadgen: {loadgen.MISSING}")
    if _PLOT.value and not importlib.util.find_spec("matplotlib"):
        raise app.UsageError("--plot: matplotlib is missing; pip install matplotlib")


def main(_: list[str]) -> None:
    """Measure, print, save, draw; exit with 1 if an answer is not its model's."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    dtype, is_small = workloads.choose_dtype(_DTYPE.value), _SCALE.value == "small"
    known = workloads.make_paper_workloads(jnp.dtype(dtype).type, is_small=is_small)
    check_flags(known)
    num = _TENANTS.value or (8 if is_small else 64)
    kind = jax.devices()[0].device_kind
    title = f"{kind}, jax {jax.__version__}, {dtype}, {num} x {_WORKLOAD.value}"
    print(f"{title}, {_SCALE.value}; deadline {_DEADLINE_MS.value:g} ms", flush=True)
    policies: dict[str, Any] = {}
    results = {"title": title, "flags": own_flags(), "policies": policies}
    answers, workload = Answers(), known[_WORKLOAD.value]
    everyone = fleets.make_fleet(workload, num + 1, _ROWS.value, jnp.dtype(dtype))
    fleet, newcomer = everyone.first(num), everyone.jobs[-1]
    if _NEWCOMER.value not in (None, _WORKLOAD.value):
        (newcomer,), _ = workloads.make_jobs(known[_NEWCOMER.value], 1, dtype)
    if newcomer.row != fleet.jobs[0].row:  # it is asked the others' requests
        raise app.UsageError(f"--newcomer: {_NEWCOMER.value} takes other inputs")
    for policy in dict.fromkeys(_POLICIES.value):
        policies[policy] = measure_policy(policy, fleet, newcomer, answers)
        if _SAVE.value:  # what was measured stays if what follows fails
            pathlib.Path(_SAVE.value).write_text(json.dumps(records.finite(results)))
    if _PLOT.value:
        plot(_PLOT.value, title, policies)
    print(f"\n{answers.num:,} answers, largest difference {answers.worst:.1e}")
    if not answers.worst <= workloads.TOLERANCE[dtype]:
        raise SystemExit("an answer is not its model's own")


def own_flags() -> dict[str, Any]:
    """Return this program's own flags and their values."""
    here = flags.FLAGS.find_module_defining_flag("rows")
    own = flags.FLAGS.flags_by_module_dict()[here]
    return {flag.name: flag.value for flag in own}


if __name__ == "__main__":
    app.run(main)
