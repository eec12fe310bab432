"""Time mixes of unlike jobs, fused and by each rival, in one run.

Rivals, each with weights and inputs that already are on the device:

    own jits  a jax.jit of each model over its rows, called one after the other
    unrolled  all models in one jax.jit
    species   jobs of equal architecture stacked, all the stacks in one jax.jit
    fused     stfuse.fuse over all jobs: launches shared by unlike jobs too

Latency waits for every call; pipelined keeps all calls of a round in flight, and waits
for the last. A figure is a median over rounds in which the rivals take turns. Before
timing, each fused answer is compared with its model alone: exit 1 if one differs.
"""

import functools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import stfuse
from examples import mixes, workloads
from examples.workloads import Run

_SCALE = flags.DEFINE_enum("scale", "full", list(mixes.SCALES), "Of the members.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "auto: bfloat16 on a GPU."
)
_MIXES = flags.DEFINE_list("mixes", [], "Which; all if empty.")
_CALLS = flags.DEFINE_integer("calls", 20, "Per rival and round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Medians are over these.", lower_bound=1)
_COST = flags.DEFINE_string("cost", "auto", "The planner's record of the device.")
_SAVE = flags.DEFINE_string("save", None, "Where to write raw numbers, as JSON.")

RIVALS = ("own jits", "unrolled", "species")


def species_run(jobs: Sequence[stfuse.Job], inputs: Mapping[str, Any]) -> Run:
    """Return what runs a stack of each architecture, all in one jit."""
    groups: dict[Any, list[stfuse.Job]] = {}
    for job in jobs:
        groups.setdefault(job.apply_fn, []).append(job)
    fuseds = [stfuse.fuse(group, cost=_COST.value) for group in groups.values()]
    banks = [fused.pack() for fused in fuseds]
    stacks = jax.device_put(
        [fused.stack({name: inputs[name] for name in fused.jobs}) for fused in fuseds]
    )

    def steps(banks: Any, stacks: Any) -> Any:
        each = zip(fuseds, banks, stacks, strict=True)
        return [fused.step(bank, stacked).leaves for fused, bank, stacked in each]

    return functools.partial(jax.jit(steps), banks, stacks)


def rival_runs(jobs: Sequence[stfuse.Job], inputs: Mapping[str, Any]) -> dict[str, Run]:
    """Return what each rival runs per call, by name; compiled at the first one."""
    fns = [jax.jit(job.apply_fn) for job in jobs]
    params = [jax.device_put(job.params) for job in jobs]
    staged = jax.device_put([inputs[job.name] for job in jobs])

    def own() -> list[Any]:
        return [fn(p, x) for fn, p, x in zip(fns, params, staged, strict=True)]

    @jax.jit
    def unrolled(params: Any, staged: Any) -> list[Any]:
        each = zip(jobs, params, staged, strict=True)
        return [job.apply_fn(p, x) for job, p, x in each]

    return {
        "own jits": own,
        "unrolled": functools.partial(unrolled, params, staged),
        "species": species_run(jobs, inputs),
    }


def measure(mix: mixes.Mix, scale: mixes.Scale, dtype: Any) -> dict[str, Any]:
    """Return all that is known of one mix, as plain numbers and lists."""
    jobs, inputs = mixes.make_jobs(mix, scale, dtype)
    start_s = time.perf_counter()
    fused = stfuse.fuse(jobs, cost=_COST.value)
    planned_s = time.perf_counter() - start_s
    bank = fused.pack()
    stacked = jax.device_put(fused.stack(inputs))
    runs = rival_runs(jobs, inputs)
    runs["fused"] = functools.partial(fused.step, bank, stacked)
    compile_s, first = workloads.warm_up(runs)
    alone = dict(zip(fused.jobs, first["own jits"], strict=True))
    difference, whose = workloads.differences(fused.split(first["fused"]), alone)
    times_us = workloads.times_us(
        runs, num_calls=_CALLS.value, num_rounds=_ROUNDS.value, most_s=60.0
    )
    return {
        "plan": fused.plan.to_dict(),
        "planned_s": planned_s,
        "compile_s": compile_s,
        "difference": difference,
        "differs_most": whose,
        "times_us": times_us,
    }


def medians(record: Mapping[str, Any], way: str) -> dict[str, float]:
    """Return microseconds per call by rival, the median of its rounds."""
    each = record["times_us"][way].items()
    return {name: float(np.median(rounds)) for name, rounds in each}


def print_mix(name: str, record: Mapping[str, Any]) -> None:
    """Print what a mix is, whether it is right, and fused over the best rival."""
    plan, seconds = record["plan"], record["compile_s"]
    print(
        f"{name}: {len(plan['jobs'])} jobs of {len(plan['species'])} species, "
        f"{plan['num_launches_alone']} heavy launches alone -> {plan['num_launches']}, "
        f"{plan['num_solo']} solo, waste {plan['waste']:.2f}"
    )
    took = ", ".join(f"{rival} {s:.1f}" for rival, s in seconds.items())
    print(f"    planned in {record['planned_s']:.1f} s; first call, s: {took}")
    ratios = []
    for way in ("latency", "pipelined"):
        us = medians(record, way)
        best = min(RIVALS, key=us.__getitem__)
        ratios.append(f"{us[best] / us['fused']:.2f} {way} ({best})")
    difference = f"difference {record['difference']:.1e}"
    print(f"    {difference}; best rival / fused: {', '.join(ratios)}", flush=True)


def print_table(way: str, title: str, records: Mapping[str, Any]) -> None:
    """Print microseconds of the fused step, and how many times as long rivals take."""
    print(f"\n{title}")
    heads = "".join(f"{rival:>10}" for rival in (*RIVALS, "best"))
    print(f"{'mix':16}{'launches':>12}{'waste':>7}{'fused us':>10}{heads}")
    for name, record in records.items():
        us, plan = medians(record, way), record["plan"]
        ratios = [us[rival] / us["fused"] for rival in RIVALS]
        launches = f"{plan['num_launches_alone']}>{plan['num_launches']}"
        cells = "".join(f"{ratio:9.2f}x" for ratio in (*ratios, min(ratios)))
        row = f"{name:16}{launches:>12}{plan['waste']:7.2f}{us['fused']:10.0f}{cells}"
        print(row)


def main(_: list[str]) -> None:
    """Measure each mix, print both tables, and fail if an answer is not its model's."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    dtype = workloads.choose_dtype(_DTYPE.value)
    scale = mixes.SCALES[_SCALE.value]
    known = mixes.make_mixes(scale, jnp.dtype(dtype).type)
    if unknown := sorted(set(_MIXES.value) - set(known)):
        raise app.UsageError(f"--mixes: no {unknown}; there are {', '.join(known)}")
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}, {dtype}, {_SCALE.value}")
    header = {"device": kind, "jax": jax.__version__, "dtype": dtype}
    records = {}
    for name in _MIXES.value or known:
        records[name] = measure(known[name], scale, jnp.dtype(dtype))
        print_mix(name, records[name])
        if _SAVE.value:  # each time: what was measured stays if the next mix fails
            saved = json.dumps({**header, "scale": _SCALE.value, "mixes": records})
            pathlib.Path(_SAVE.value).write_text(saved)
    times = f"rivals' time over fused, {_CALLS.value} calls a round"
    print_table("latency", f"latency: every call is waited for; {times}", records)
    print_table("pipelined", f"pipelined: calls in flight; {times}", records)
    limit = workloads.TOLERANCE[dtype]
    wrong = [name for name, r in records.items() if not r["difference"] <= limit]
    if wrong:
        raise SystemExit(f"an answer is not its model's own: {', '.join(wrong)}")


if __name__ == "__main__":
    app.run(main)
