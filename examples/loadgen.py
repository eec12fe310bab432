"""MLPerf's LoadGen drives an engine: its Server scenario, as a second opinion.

LoadGen draws Poisson arrivals and says whether a run is valid: enough queries, long
enough, and as many of them within the latency asked for that its 99th percentile is
below that. Here a run is valid only if the engine also refused and failed nothing:
LoadGen would take a refusal for a quick answer.

LoadGen's verdicts on this engine are no MLPerf results: nothing here is a benchmark of
MLPerf's, was submitted to it, or was reviewed by it.

Source: Reddi et al., MLPerf Inference Benchmark, 2019, arXiv:1911.02549, section 4.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

import stfuse
from examples.fleet import Fleet
from examples.load import Target, no_collections

MISSING = "LoadGen is missing; pip install mlcommons-loadgen"


def is_installed() -> bool:
    """Return whether LoadGen can be imported."""
    return importlib.util.find_spec("mlperf_loadgen") is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What LoadGen said of one run.

    Attributes:
        is_valid: whether it called the run valid, and nothing was refused or failed.
        reason: what was not satisfied; empty if valid.
        target_qps: queries/s asked for.
        completed_per_s: queries/s completed.
        p50_ms: median latency from the scheduled time, in LoadGen's own count.
        p99_ms: its 99th percentile.
        num_queries: how many were issued.
        num_refused: how many the engine refused or failed.
        difference: largest relative difference of an answer from its model alone.
    """

    is_valid: bool
    reason: str
    target_qps: float
    completed_per_s: float
    p50_ms: float
    p99_ms: float
    num_queries: int
    num_refused: int
    difference: float


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a run must do to be valid.

    Attributes:
        latency_s: that the 99th percentile must not exceed, seconds.
        min_duration_s: how long queries are issued at least.
        min_queries: how many at least; below some 460 LoadGen calls nothing valid.
        seed: of arrivals and of what is asked.
    """

    latency_s: float
    min_duration_s: float = 2.0
    min_queries: int = 500
    seed: int = 0


class SystemUnderTest:
    """Passes LoadGen's queries on to an engine, and the engine's answers back.

    Query number ``i`` asks tenant ``i % N`` for its request ``i // N``.

    Args:
        engine: has a job for every target.
        targets: N of them.
        complete: called with a query's id when it ended, whatever became of it.
    """

    def __init__(
        self,
        engine: Any,
        targets: Sequence[Target],
        complete: Callable[[int], None],
    ) -> None:
        """Start with nothing asked."""
        self._submit, self._complete = engine.submit, complete
        self._requests = [
            (target.name, inputs)
            for each in zip(*(target.inputs for target in targets), strict=True)
            for target, inputs in zip(targets, each, strict=True)
        ]
        self.num_refused = 0
        self.asked: list[int] = []
        self.futures: list[Future[Any]] = []

    @property
    def num_samples(self) -> int:
        """How many different queries there are."""
        return len(self._requests)

    def issue(self, queries: Sequence[Any]) -> None:
        """Submit some queries: LoadGen calls this when they are due."""
        for query in queries:
            name, inputs = self._requests[query.index]
            try:
                future = self._submit(name, inputs)
            except stfuse.StfuseError:
                self.num_refused += 1
                self._complete(query.id)
                continue
            self.asked.append(query.index)
            self.futures.append(future)
            future.add_done_callback(functools.partial(self._end, query.id))

    def _end(self, query_id: int, _: Future[Any]) -> None:
        self._complete(query_id)

    def outputs(self) -> list[Any]:
        """Return what was answered, None where the engine failed; count failures."""
        ended = [
            None if future.exception() else future.result() for future in self.futures
        ]
        self.num_refused += sum(output is None for output in ended)
        return ended


def parse(summary: str) -> dict[str, str]:
    r"""Return the lines ``name : value`` of LoadGen's summary.

    Example:
        >>> parse("Result is : VALID\n  Min queries satisfied : Yes\n====")
        {'Result is': 'VALID', 'Min queries satisfied': 'Yes'}
    """
    pairs = (line.split(":", 1) for line in summary.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _reason(found: dict[str, str], num_refused: int) -> str:
    """Return what kept a run from being valid."""
    unmet = [name for name in found if name.endswith("satisfied")]
    unmet = [name for name in unmet if found[name].upper() != "YES"]
    if num_refused:
        unmet.append(f"{num_refused} queries refused or failed")
    return "; ".join(unmet)


def run_server(
    engine: stfuse.Engine, fleet: Fleet, target_qps: float, settings: Settings
) -> Verdict:
    """Run LoadGen's Server scenario against an engine.

    Requests carry no deadline: the engine must answer all of them.

    Args:
        engine: has the fleet's jobs.
        fleet: whose requests are sent, all equally often.
        target_qps: queries per second.
        settings: what the run must do to be valid.

    Raises:
        ImportError: LoadGen is not installed.
    """
    import mlperf_loadgen as lg  # an extra

    def complete(query_id: int) -> None:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query_id, 0, 0)])

    sut = SystemUnderTest(engine, fleet.targets, complete)
    asked, where = lg.TestSettings(), lg.LogSettings()
    asked.scenario, asked.mode = (
        lg.TestScenario.Server,
        lg.TestMode.PerformanceOnly,
    )
    asked.server_target_qps = target_qps
    asked.server_target_latency_ns = round(1e9 * settings.latency_s)
    asked.min_duration_ms = round(1e3 * settings.min_duration_s)
    asked.min_query_count = settings.min_queries
    asked.schedule_rng_seed = asked.sample_index_rng_seed = settings.seed
    where.enable_trace = False
    with tempfile.TemporaryDirectory() as folder:
        output = lg.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = folder, False
        where.log_output = output
        under_test = lg.ConstructSUT(sut.issue, lambda: None)
        library = lg.ConstructQSL(
            sut.num_samples, sut.num_samples, lambda _: None, lambda _: None
        )
        with no_collections():
            lg.StartTestWithLogSettings(under_test, library, asked, where)
        lg.DestroyQSL(library)
        lg.DestroySUT(under_test)
        summary = pathlib.Path(folder, "mlperf_log_summary.txt").read_text()
    return _verdict(sut, fleet, target_qps, parse(summary))


def _verdict(
    sut: SystemUnderTest, fleet: Fleet, target_qps: float, found: dict[str, str]
) -> Verdict:
    outputs, asked = sut.outputs(), np.array(sut.asked, int)
    num = len(fleet.targets)
    return Verdict(
        found["Result is"] == "VALID" and not sut.num_refused,
        _reason(found, sut.num_refused),
        target_qps,
        float(found["Completed samples per second"]),
        1e-6 * float(found["50.00 percentile latency (ns)"]),
        1e-6 * float(found["99.00 percentile latency (ns)"]),
        len(outputs),
        sut.num_refused,
        fleet.difference(asked % num, asked // num, outputs),
    )


def search(
    run_fn: Callable[[float], Verdict], rate: float, num_runs: int
) -> list[Verdict]:
    """Look for the largest valid rate: double until invalid, then bisect.

    Args:
        run_fn: runs LoadGen at a rate.
        rate: the first one tried; halved for as long as nothing is valid.
        num_runs: how often to run.

    Returns:
        All runs, in their order.
    """
    runs: list[Verdict] = []
    valid, invalid = 0.0, float("inf")
    for _ in range(num_runs):
        runs.append(run_fn(rate))
        if runs[-1].is_valid:
            valid = max(valid, rate)
        else:
            invalid = min(invalid, rate)
        if valid == 0.0:
            rate = invalid / 2
        elif invalid == float("inf"):
            rate = 2 * valid
        else:
            rate = (valid + invalid) / 2
    return runs


def best(runs: Sequence[Verdict]) -> Verdict | None:
    """Return the valid run of the largest rate, None without one."""
    valid = [run for run in runs if run.is_valid]
    return max(valid, key=lambda run: run.target_qps, default=None)


def line(run: Verdict) -> str:
    """Return what a run came to, as one line."""
    said = "VALID" if run.is_valid else f"INVALID ({run.reason})"
    return (
        f"{run.target_qps:12,.0f}/s asked {run.completed_per_s:12,.0f}/s done  "
        f"p50 {run.p50_ms:8.2f} ms  p99 {run.p99_ms:8.2f} ms  "
        f"{run.num_queries:7,} queries  {said}"
    )


def search_policy(
    engine: stfuse.Engine,
    fleet: Fleet,
    rate: float,
    settings: Settings,
    num_runs: int,
) -> dict[str, Any]:
    """Search, and print each run and the largest valid rate.

    Returns:
        ``largest_valid_per_s`` (0 if there is none), ``difference`` and all ``runs``.
    """

    def run(target_qps: float) -> Verdict:
        found = run_server(engine, fleet, target_qps, settings)
        print(f"  {line(found)}", flush=True)
        return found

    runs = search(run, rate, num_runs)
    found = best(runs)
    largest = found.target_qps if found else 0.0
    print(f"  largest valid rate: {largest:,.0f}/s", flush=True)
    return {
        "largest_valid_per_s": largest,
        "difference": max(run.difference for run in runs),
        "runs": [dataclasses.asdict(run) for run in runs],
    }
