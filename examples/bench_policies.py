"""The seed's own table with numbers: four ways to share a device, side by side.

    exclusive   one model on a device of its own
    time        a process per model, taking turns
    space       a process per model under CUDA MPS
    space-time  one process, one fused step

Utilization and throughput are of loops without a server; served is what a server gets
through, p50 and p99 what it answers in at 70% of that. Spread is the slowest tenant's
median over the fastest's there; interference is p99 of the others beside an abusive
tenant over their p99 beside a peaceful one; in each way it asks for ten shares, and has
four requests in flight at most. Requests of space-time wait 2 ms for company. Rows are
kept in RESULTS/policies.json, of which `python -m examples.figures` makes a table.
"""

import functools
import time

import jax
import numpy as np
from absl import app, flags, logging

from examples import figures, paper, paper_models, paper_predictability
from examples import fleet as fleets
from examples.paper_models import Member, dtype_here, known
from examples.records import Records

_MODEL = flags.DEFINE_string("model", "minilm", "A workload's name.")
_TENANTS = flags.DEFINE_integer("tenants", 16, "How many models.", lower_bound=2)
_SCALE = flags.DEFINE_enum("scale", "full", ["full", "small"], "Of the models.")
_RESULTS = flags.DEFINE_string(
    "results", None, "Folder; examples/results on a GPU, examples/out elsewhere."
)
_MINUTES = flags.DEFINE_float("minutes", 7.5, "Nothing is begun after these.")
_SECONDS = flags.DEFINE_float("seconds", 0.4, "Of one measurement.")
_PROCESSES = flags.DEFINE_integer(
    "processes", paper.MOST_PROCESSES, "At once, at most; 0 for none.", lower_bound=0
)
_ONLY = flags.DEFINE_multi_string("only", [], "NAME=VALUE,...: of a key; all if none.")
_SINCE = flags.DEFINE_string("since", "", "A date: what is older is measured again.")


def measure(part: paper.Part, model: str, num: int) -> None:
    """Measure what is missing.

    Args:
        part: where to keep it.
        model: a workload's name.
        num: how many models.
    """
    base = {"part": "policies", "model": model, "tenants": num}
    members: list[Member] = [(model, i) for i in range(num)]
    one = members[:1]
    part.measure({**base, "way": "work"}, functools.partial(work, part, one))
    alone = functools.partial(paper_models.in_process, part, one, "in turn")
    part.measure({**base, "way": "exclusive"}, alone)
    fused = functools.partial(paper_models.in_process, part, members, "space-time")
    part.measure({**base, "way": "space-time"}, fused)
    for way in ("time", "space"):
        key = {**base, "way": way}
        if part.processes < num or part.is_done([key]):
            continue
        with paper.pool_of(way, num) as pool:
            if pool is not None:
                held = paper_models.hold(part, pool, members, num)
                of = functools.partial(paper_models.in_pool, part, pool, held)
                part.measure(key, of)
    dtype = np.dtype(dtype_here())
    fleet = fleets.make_fleet(known(dtype_here(), part.scale)[model], num, 1, dtype)
    beside, of = ("load 0.7", "abuse"), paper_predictability.measure_way
    of(part, "exclusive", base, fleet.first(1), model, beside[:1])
    for way in ("space-time", "time", "space"):
        of(part, way, base, fleet, model, beside)


def work(part: paper.Part, one: list[Member]) -> dict[str, float | None]:
    """Return what a request of a model asks of the device, and what that can do."""
    found = paper_models.work_of(one, part.scale)
    return {**found, **paper.peaks()}


def main(_: list[str]) -> None:
    """Measure, print the table."""
    logging.set_verbosity(logging.ERROR)
    paper.keep_room()
    end_s = time.perf_counter() + 60 * _MINUTES.value
    records = Records(paper.results_folder(_RESULTS.value) / "policies.json")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {records.path}")
    if _MODEL.value not in (names := known(dtype_here(), _SCALE.value)):
        there = ", ".join(names)
        raise app.UsageError(f"--model: no {_MODEL.value}; there are {there}")
    part = paper.Part(
        records,
        _SCALE.value,
        _SECONDS.value,
        end_s,
        _PROCESSES.value,
        paper.only(_ONLY.value),
        _SINCE.value,
    )
    measure(part, _MODEL.value, _TENANTS.value)
    if len(records.here()):
        print("\n" + figures.policies_table(records.here()))
    paper.check(part)


if __name__ == "__main__":
    app.run(main)
