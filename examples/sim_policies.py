"""Compare policies under load by simulation: the real scheduler, a device of numbers.

Requests have one row and a deadline; loads are multiples of what space-time can serve
in its best bucket. Misses are requests without an answer by their deadline, for
whatever reason; Jain's index is of device seconds per tenant: 1 where all got as much.
"""

import csv
import time
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from stfuse.testing import (
    Arrivals,
    Simulation,
    diurnal,
    flash_crowd,
    poisson,
    read_arrivals,
    simulate,
)

POLICIES = ("exclusive", "time", "space-time")

_TENANTS = flags.DEFINE_integer("tenants", 64, "Who asks.", lower_bound=1)
_REQUESTS = flags.DEFINE_integer("requests", 20_000, "Of each run.", lower_bound=1)
_LOADS = flags.DEFINE_list("loads", ["0.1", "0.5", "0.9", "2", "10"], "Times capacity.")
_DEADLINE_MS = flags.DEFINE_float("deadline_ms", 20.0, "Of every request.")
_ZIPF = flags.DEFINE_float("zipf", 1.0, "Exponent over tenants; 0 makes them equal.")
_CV = flags.DEFINE_float("cv", 1.0, "Of the gaps: 1 is Poisson, 8 very bursty.")
_SHAPE = flags.DEFINE_enum(
    "shape", "steady", ["steady", "diurnal", "flash"], "Of the rate over time."
)
_LAUNCH_US = flags.DEFINE_float("launch_us", 300.0, "Of a step, whatever is in it.")
_ROW_US = flags.DEFINE_float("row_us", 6.0, "Of a slot's first row.")
_MORE_US = flags.DEFINE_float("more_us", 2.0, "Of each further row of a slot.")
_NOISE = flags.DEFINE_float("noise", 0.05, "Of step times: deviation of their logs.")
_CSV = flags.DEFINE_string("csv", None, "Arrivals (timestamp, tenant) to play once.")
_SEED = flags.DEFINE_integer("seed", 0, "Of arrivals and noise.")
_SAVE = flags.DEFINE_string("save", None, "Where to write the table, as CSV.")
_PLOT = flags.DEFINE_string("plot", None, "Where to draw goodput against load.")


def cost_table(most_slots: int) -> dict[tuple[int, int], float]:
    """Return seconds of a step by slots and rows per slot, as the flags say."""
    slots = [2**i for i in range(7) if 2**i <= most_slots]
    return {
        (k, b): 1e-6
        * (_LAUNCH_US.value + k * (_ROW_US.value + (b - 1) * _MORE_US.value))
        for k in slots
        for b in (1, 2, 4, 8)
    }


def make_trace(rate: float) -> Arrivals:
    """Return arrivals at a mean rate, of the shape that the flags say."""
    options = {"seed": _SEED.value, "cv": _CV.value, "exponent": _ZIPF.value}
    steady = _SHAPE.value == "steady"
    unit = poisson(rate if steady else 1.0, _REQUESTS.value, _TENANTS.value, **options)
    seconds = _REQUESTS.value / rate
    if _SHAPE.value == "diurnal":
        return diurnal(unit, seconds / 2, rate, 0.8)
    if _SHAPE.value == "flash":  # a tenth of the time at five times the rate
        return flash_crowd(unit, seconds / 3, seconds / 10, rate / 1.4, 5 * rate / 1.4)
    return unit


def row_of(run: Simulation) -> dict[str, Any]:
    """Return what is printed of a run."""
    return {
        "goodput/s": run.goodput,
        "misses": run.misses,
        "shed": run.shed + run.refused,
        "expired": run.expired,
        "late": run.late,
        "p50 ms": 1e3 * run.quantile_s(0.5),
        "p99 ms": 1e3 * run.quantile_s(0.99),
        "p99.9 ms": 1e3 * run.quantile_s(0.999),
        "Jain": run.fairness(),
        "tenants/step": run.tenants_per_step,
        "steps": run.steps,
    }


def print_row(policy: str, load: str, row: Mapping[str, Any], took_s: float) -> None:
    """Print a run."""
    cells = "".join(
        f"{x:>13d}" if isinstance(x, int) else f"{x:>13.4g}" for x in row.values()
    )
    print(f"{policy:12}{load:>8}{cells}{took_s:>9.1f}", flush=True)


def plot(path: str, rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Draw goodput against load, a line per policy."""
    from matplotlib.figure import Figure  # needs no screen

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for policy in POLICIES:
        own = [
            (float(load), row) for (name, load), row in rows.items() if name == policy
        ]
        loads, good = zip(*((x, row["goodput/s"]) for x, row in own), strict=True)
        axes.plot(loads, good, marker="o", label=policy)
    axes.set(xlabel="load, times capacity", ylabel="answers in time per second")
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(_: list[str]) -> None:
    """Simulate, print, save."""
    table = cost_table(_TENANTS.value)
    capacity = max(slots * rows / step_s for (slots, rows), step_s in table.items())
    deadline_s = _DEADLINE_MS.value / 1e3
    if _CSV.value:
        traces = {"file": read_arrivals(_CSV.value)}
    else:
        traces = {load: make_trace(float(load) * capacity) for load in _LOADS.value}
    print(f"capacity {capacity:.0f} rows/s; deadline {_DEADLINE_MS.value} ms")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for load, trace in traces.items():
        for policy in POLICIES:
            start_s = time.perf_counter()
            run = simulate(
                trace,
                table,
                policy,
                deadline_s=deadline_s,
                num_tenants=None if _CSV.value else _TENANTS.value,
                noise=_NOISE.value,
                seed=_SEED.value,
            )
            row = rows[policy, load] = row_of(run)
            if len(rows) == 1:
                heads = "".join(f"{name:>13}" for name in row)
                print(f"{'policy':12}{'load':>8}{heads}{'took s':>9}")
            print_row(policy, load, row, time.perf_counter() - start_s)
    if _SAVE.value:
        with open(_SAVE.value, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["policy", "load", *next(iter(rows.values()))])
            writer.writerows([[*key, *row.values()] for key, row in rows.items()])
    if _PLOT.value and not _CSV.value:
        plot(_PLOT.value, rows)


if __name__ == "__main__":
    app.run(main)
