"""MLPerf's LoadGen drives an engine, and calls a modest rate valid."""

import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from examples import fleet, load, loadgen, workloads
from tests.test_bench_serving import ROOT, run
from tests.test_examples import SMALLEST

PATIENT = loadgen.Settings(latency_s=2.0, min_duration_s=1.0, min_queries=800)
VALID = "Result is : VALID\nCompleted samples per second : 9.5\n"
VALID += "50.00 percentile latency (ns) : 2000000\n"
VALID += "99.00 percentile latency (ns) : 3500000\n"


@pytest.fixture(scope="module")
def tenants():
    workload = workloads.make_workloads(jnp.float32, is_small=True)["mlp"]
    return fleet.make_fleet(workload, 3, 1, jnp.float32)


def test_loadgen_calls_a_small_rate_valid_and_every_answer_is_its_models(tenants):
    with fleet.serve(tenants.jobs, max_batch_size=4) as engine:
        found = loadgen.run_server(engine, tenants, 200.0, PATIENT)
        served = engine.stats().served
    assert found.is_valid and found.reason == ""
    assert found.num_queries >= 800 and found.num_queries == served
    assert found.num_refused == 0 and found.difference < 1e-5


def test_loadgen_calls_nothing_valid_that_is_too_short(tenants):
    few = loadgen.Settings(latency_s=2.0, min_duration_s=0.1, min_queries=50)
    with fleet.serve(tenants.jobs, max_batch_size=4) as engine:
        found = loadgen.run_server(engine, tenants, 200.0, few)
    assert not found.is_valid and found.reason == "Early stopping satisfied"


def test_the_command_prints_the_verdict():
    asked = ("--target_qps=200", "--min_query_count=800", "--min_duration=1")
    result = run("examples.bench_loadgen", *SMALLEST["bench_loadgen"], *asked)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " VALID" in result.stdout and "INVALID" not in result.stdout
    assert "no MLPerf results" in result.stdout


def test_the_command_fails_without_a_valid_run_and_saves_what_it_saw(tmp_path):
    saved = tmp_path / "runs.json"
    asked = ("--min_query_count=50", "--min_duration=0.1", f"--save={saved}")
    result = run("examples.bench_loadgen", *SMALLEST["bench_loadgen"], *asked)
    assert result.returncode == 1 and "no run was valid" in result.stderr
    assert '"reason": "Early stopping satisfied"' in saved.read_text()


def test_the_command_says_how_to_get_what_is_missing():
    code = "import sys; sys.modules['mlperf_loadgen'] = None; "
    code += "from absl import app; from examples import bench_loadgen; "
    result = subprocess.run(
        [sys.executable, "-c", code + "app.run(bench_loadgen.main)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 1
    assert "pip install mlcommons-loadgen" in result.stderr


class Refusing:
    """Answers a tenant's requests, and refuses or fails the others."""

    def submit(self, name, inputs):
        if name == "full":
            raise stfuse.QueueFullError("full")
        future = Future()
        if name == "broken":
            future.set_exception(stfuse.DeviceError("broken"))
        else:
            future.set_result(inputs)
        return future


def asked(*names):
    """Return a system under test that was asked each target's two requests."""
    targets = [load.Target(name, [np.ones(1), np.full(1, 2.0)]) for name in names]
    ended = []
    sut = loadgen.SystemUnderTest(Refusing(), targets, ended.append)
    numbers = range(sut.num_samples)
    sut.issue([SimpleNamespace(id=100 + i, index=i) for i in numbers])
    assert ended == [100 + i for i in numbers]  # LoadGen waits for all of them
    alone = np.array([[[1.0], [2.0]]] * len(names), np.float32)
    return sut, fleet.Fleet([], targets, alone, 1)


def test_a_query_asks_each_tenant_in_turn_for_each_of_its_requests():
    sut, own = asked("a", "b", "c")
    assert [output[0] for output in sut.outputs()] == [1, 1, 1, 2, 2, 2]
    found = loadgen._verdict(sut, own, 9.0, loadgen.parse(VALID))
    assert found.is_valid and found.difference == 0 and found.num_refused == 0
    assert (found.completed_per_s, found.p50_ms, found.p99_ms) == (9.5, 2.0, 3.5)


@pytest.mark.parametrize("name", ["full", "broken"])
def test_a_run_that_refused_or_failed_a_query_is_not_valid(name):
    sut, own = asked("a", name)
    found = loadgen._verdict(sut, own, 9.0, loadgen.parse(VALID))
    assert not found.is_valid and found.num_refused == 2
    assert found.reason == "2 queries refused or failed"


def test_what_was_not_satisfied_is_named():
    summary = "Result is : INVALID\n  Performance constraints satisfied : NO\n"
    summary += "  Min duration satisfied : Yes\n  Early stopping satisfied: NO\n"
    found = loadgen.parse(VALID + summary)
    reason = loadgen._reason(found, 0)
    assert reason == "Performance constraints satisfied; Early stopping satisfied"


def verdict(rate, is_valid):
    return loadgen.Verdict(is_valid, "", rate, rate, 1.0, 1.0, 500, 0, 0.0)


@pytest.mark.parametrize(
    ("first", "rates", "largest"),
    [
        (100.0, [100, 200, 400, 800, 600, 700, 750], 700),
        (4000.0, [4000, 2000, 1000, 500, 750, 625, 687.5], 687.5),
        (1e6, [1e6 / 2**i for i in range(7)], None),
    ],
)
def test_a_search_doubles_until_invalid_and_then_bisects(first, rates, largest):
    runs = loadgen.search(lambda rate: verdict(rate, rate <= 700), first, 7)
    assert [run.target_qps for run in runs] == rates
    found = loadgen.best(runs)
    assert (found.target_qps if found else None) == largest
