"""Time k active models out of N: does a step pay for the idle ones?

    dense k    stfuse.fuse over k models, all of them asked
    k of N     stfuse.fuse over N models, k asked: a contiguous run of slots, or
               scattered ones
    all N      the same fused models, all of them asked

Latency waits for every call; pipelined keeps all calls of a round in flight, and waits
for the last. A figure is a median over rounds in which the rows take turns, with inputs
already on the device. Before timing, each answer is compared with its model alone: exit
1 if one differs.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import stfuse
from examples import workloads
from examples.workloads import Run

_CASES = flags.DEFINE_list(
    "cases",
    ["minilm:64:16:32", "bert:64:4:16"],
    "workload:N:k or workload:N:k:tokens; tokens are steps for an LSTM.",
)
_SCALE = flags.DEFINE_enum("scale", "full", ["full", "small"], "Of the models.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "auto: bfloat16 on a GPU."
)
_CALLS = flags.DEFINE_integer("calls", 20, "Per row and round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Medians are over these.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 0.3, "Fewer calls if they take longer.")
_COST = flags.DEFINE_string("cost", "auto", "The planner's record of the device.")
_LOWERING = flags.DEFINE_enum("lowering", "auto", ["auto", "native"], "Of the steps.")
_SAVE = flags.DEFINE_string("save", None, "Where to write raw numbers, as JSON.")


class Case(NamedTuple):
    """How many of how many models are asked.

    Attributes:
        workload: a key of `workloads.make_workloads`.
        num_jobs: N.
        num_active: k.
        num_tokens: T; None for the workload's own.
    """

    workload: str
    num_jobs: int
    num_active: int
    num_tokens: int | None = None


def parse_case(text: str) -> Case:
    """Return a case from ``workload:N:k`` or ``workload:N:k:tokens``.

    Raises:
        UsageError: it is something else, or k is not in 1..N-1.
    """
    name, *numbers = text.split(":")
    known = workloads.make_workloads(jnp.float32)
    if name not in known:
        raise app.UsageError(f"--cases: no {name!r}; there are {', '.join(known)}")
    if len(numbers) not in (2, 3) or not all(n.isdecimal() for n in numbers):
        raise app.UsageError(f"--cases: found {text!r}; pass workload:N:k:tokens")
    case = Case(name, *map(int, numbers))
    if not 0 < case.num_active < case.num_jobs or case.num_tokens == 0:
        raise app.UsageError(f"--cases: found {text!r}; k must be in 1..N-1")
    return case


def active_sets(names: Sequence[str], num_active: int) -> dict[str, list[str]]:
    """Return who is asked, by row of the table: a run of slots, and scattered ones."""
    num_jobs = len(names)
    start = (num_jobs - num_active) // 2
    drawn = np.random.default_rng(0).choice(num_jobs, num_active, replace=False)
    of = f"{num_active} of {num_jobs}"
    return {
        f"{of}, contiguous": list(names[start : start + num_active]),
        f"{of}, scattered": [names[i] for i in sorted(drawn)],
        f"all {num_jobs}": list(names),
    }


def make_runs(
    jobs: Sequence[stfuse.Job], inputs: Mapping[str, Any], num_active: int
) -> tuple[dict[str, Run], dict[str, stfuse.Fused]]:
    """Return what each row of the table runs per call, and who splits its answers."""
    dense, fused = (
        stfuse.fuse(some, cost=_COST.value, lowering=_LOWERING.value)
        for some in (jobs[:num_active], jobs)
    )
    own = {name: inputs[name] for name in dense.jobs}
    label = f"dense {num_active}"
    runs = {label: workloads.fused_run(dense, dense.pack(), own)}
    fuseds = {label: dense}
    bank = fused.pack()
    for row, names in active_sets(list(fused.jobs), num_active).items():
        own = {name: inputs[name] for name in names}
        runs[row] = workloads.fused_run(fused, bank, own)
        fuseds[row] = fused
    return runs, fuseds


def measure(case: Case, dtype: str, is_small: bool) -> dict[str, Any]:
    """Return all that is known of one case, as plain numbers and lists."""
    known = workloads.make_workloads(
        jnp.dtype(dtype).type, is_small=is_small, num_tokens=case.num_tokens
    )
    workload = known[case.workload]
    jobs, inputs = workloads.make_jobs(workload, case.num_jobs, jnp.dtype(dtype))
    alone = workloads.answers_alone(jobs, inputs)
    runs, fuseds = make_runs(jobs, inputs, case.num_active)
    compile_s, first = workloads.warm_up(runs)
    found = {}
    for row, stacked in first.items():
        found[row], _ = workloads.differences(fuseds[row].split(stacked), alone)
    times = workloads.times_us(
        runs,
        num_calls=_CALLS.value,
        num_rounds=_ROUNDS.value,
        most_s=_SECONDS.value,
    )
    num_bytes = workloads.used_bytes(workload, jobs[0].params)
    num_rows = {row: len(fuseds[row].split(first[row])) for row in runs}
    flops = workloads.true_flops(fuseds[f"all {case.num_jobs}"].plan.to_dict())
    return {
        "times_us": times,
        "medians_us": workloads.medians(times),
        "compile_s": compile_s,
        "differences": found,
        "floors_us": {
            row: workloads.floor_us(n * num_bytes, n * flops / case.num_jobs)
            for row, n in num_rows.items()
        },
    }


def print_case(title: str, record: Mapping[str, Any]) -> None:
    """Print a line per row: times, and how many times the first row's they are."""
    print(f"\n{title}")
    ways = "".join(f"{way + ' us':>14}{'ratio':>8}" for way in workloads.WAYS)
    print(f"{'':22}{ways}{'floor us':>10}{'difference':>12}{'first call, s':>15}")
    dense = next(iter(record["compile_s"]))
    for row, seconds in record["compile_s"].items():
        cells = ""
        for us in record["medians_us"].values():
            cells += f"{us[row]:14.0f}{us[row] / us[dense]:7.2f}x"
        floor = record["floors_us"][row]
        cells += f"{floor:10.0f}" if floor else f"{'-':>10}"
        cells += f"{record['differences'][row]:12.1e}{seconds:15.1f}"
        print(f"{row:22}{cells}", flush=True)


def main(_: list[str]) -> None:
    """Measure each case, and fail if an answer is not its model's."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    cases = {text: parse_case(text) for text in _CASES.value}
    dtype, is_small = workloads.choose_dtype(_DTYPE.value), _SCALE.value == "small"
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}, {dtype}, {_SCALE.value}")
    header = {"device": kind, "jax": jax.__version__, "dtype": dtype}
    records = {}
    for text, case in cases.items():
        records[text] = measure(case, dtype, is_small)
        print_case(text, records[text])
        if _SAVE.value:  # each time: what was measured stays if the next case fails
            saved = json.dumps({**header, "scale": _SCALE.value, "cases": records})
            pathlib.Path(_SAVE.value).write_text(saved)
    limit = workloads.TOLERANCE[dtype]
    wrong = [
        f"{text} ({row})"
        for text, record in records.items()
        for row, difference in record["differences"].items()
        if not difference <= limit
    ]
    if wrong:
        raise SystemExit(f"an answer is not its model's own: {', '.join(wrong)}")


if __name__ == "__main__":
    app.run(main)
