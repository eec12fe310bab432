"""Serve tenants under MLPerf LoadGen's Server scenario: is a rate valid, and which is?

Prints LoadGen's verdict on a rate for each policy; with ``--search``, the largest rate
found valid. Needs the extra ``loadgen``. No MLPerf results: see `examples.loadgen`.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from examples import fleet as fleets
from examples import loadgen, workloads

POLICIES = ("time", "exclusive", "space-time")

_POLICY = flags.DEFINE_multi_enum(
    "policy", ["space-time"], POLICIES, "Which; may be given several times."
)
_SCALE = flags.DEFINE_enum("scale", "small", ["full", "small"], "Of the models.")
_WORKLOAD = flags.DEFINE_string("workload", "minilm", "What all tenants run.")
_TENANTS = flags.DEFINE_integer("tenants", None, "64 or, if small, 8.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "auto: bfloat16 on a GPU."
)
_MAX_BATCH_SIZE = flags.DEFINE_integer("max_batch_size", 4, "Of the engine.")
_TARGET_QPS = flags.DEFINE_float(
    "target_qps", 100.0, "Queries/s; with --search, the first rate tried."
)
_LATENCY_MS = flags.DEFINE_float("target_latency_ms", 20.0, "Of the 99th percentile.")
_SECONDS = flags.DEFINE_float("min_duration", 2.0, "Of a run, seconds.")
_QUERIES = flags.DEFINE_integer("min_query_count", 500, "Of a run.")
_SEARCH = flags.DEFINE_bool("search", False, "Find the largest valid rate.")
_STEPS = flags.DEFINE_integer("search_steps", 8, "Runs of a search.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of arrivals and of what is asked.")
_SAVE = flags.DEFINE_string("save", None, "Where to write raw numbers, as JSON.")


def main(_: list[str]) -> None:
    """Run or search under each policy; exit with 1 if a run is invalid, or wrong."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    if not loadgen.is_installed():
        raise app.UsageError(loadgen.MISSING)
    dtype, is_small = workloads.choose_dtype(_DTYPE.value), _SCALE.value == "small"
    known = workloads.make_workloads(jnp.dtype(dtype).type, is_small=is_small)
    if _WORKLOAD.value not in known:
        there = ", ".join(known)
        raise app.UsageError(f"--workload: no {_WORKLOAD.value}; there are {there}")
    num = _TENANTS.value or (8 if is_small else 64)
    fleet = fleets.make_fleet(known[_WORKLOAD.value], num, 1, jnp.dtype(dtype))
    settings = loadgen.Settings(
        _LATENCY_MS.value / 1e3, _SECONDS.value, _QUERIES.value, _SEED.value
    )
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}, {dtype}, {num} tenants; p99 within")
    print(f"{_LATENCY_MS.value:g} ms, as LoadGen counts; no MLPerf results")
    num_runs, found = _STEPS.value if _SEARCH.value else 1, {}
    for policy in dict.fromkeys(_POLICY.value):
        print(f"{policy}:", flush=True)
        options = {"policy": policy, "max_batch_size": _MAX_BATCH_SIZE.value}
        with fleets.serve(fleet.jobs, max_slots=max(num, 64), **options) as engine:
            found[policy] = loadgen.search_policy(
                engine, fleet, _TARGET_QPS.value, settings, num_runs
            )
    if _SAVE.value:
        pathlib.Path(_SAVE.value).write_text(json.dumps(found))
    if not max(f["difference"] for f in found.values()) <= workloads.TOLERANCE[dtype]:
        sys.exit("an answer is not its model's own")
    if not all(f["largest_valid_per_s"] for f in found.values()):
        sys.exit("no run was valid")


if __name__ == "__main__":
    app.run(main)
