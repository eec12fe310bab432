"""The benchmark of ways to share: what it keeps, its processes, its sums."""

import contextlib
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import (
    figures,
    paper,
    paper_gemm,
    paper_models,
    paper_predictability,
    paper_worker,
    records,
    workloads,
)
from examples.processes import Pool
from tests.test_examples import SMALLEST, run

GEMM = {"do": "load", "scale": "small", "dtype": "float32", "precision": "highest"}
GEMM |= {"workload": "conv2_2", "count": 2, "repeat": 8}


@pytest.fixture(scope="module")
def pool():
    with Pool(2, {"JAX_PLATFORMS": "cpu"}) as pool:
        yield pool


def test_rows_are_kept_replaced_and_found_again(tmp_path):
    path = tmp_path / "new" / "rows.json"
    kept = records.Records(path)
    assert kept.get({"R": 1}) is None
    kept.add({"R": 1}, {"us": 3.0})
    kept.add({"R": 2}, {"us": 4.0})
    kept.add({"R": 1}, {"us": 5.0})
    again = records.Records(path)
    assert again.get({"R": 1}) == {"us": 5.0} and again.get({"R": 2}) == {"us": 4.0}
    assert len(again.rows) == 2 and len(again.here()) == 2
    assert again.rows[0]["about"]["jax"] == jax.__version__
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("name", ["device", "jax"])
def test_rows_of_another_machine_or_version_are_measured_again(tmp_path, name):
    path = tmp_path / "rows.json"
    kept = records.Records(path)
    kept.add({"R": 1}, {"us": 3.0})
    rows = json.loads(path.read_text())
    rows["rows"][0]["about"][name] = "another"
    path.write_text(json.dumps(rows))
    again = records.Records(path)
    assert again.get({"R": 1}) is None and again.here() == []
    assert len(again.rows) == 1  # and it is not thrown away


@pytest.mark.parametrize("text", ["", '{"rows": [', "[]", '{"rows": [{"key": {}}]}'])
def test_a_broken_file_is_named_and_left_alone(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="rows.json: expected the rows"):
        records.Records(path)
    assert path.read_text() == text


def part_of(path, end_s=None, processes=2):
    end_s = time.perf_counter() + 600 if end_s is None else end_s
    return paper.Part(records.Records(path), "small", 0.05, end_s, processes)


def test_what_was_measured_is_not_measured_again_and_nothing_once_time_is_up(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"per_s": len(calls)}

    path = tmp_path / "rows.json"
    assert part_of(path).measure({"R": 1}, measure) == {"per_s": 1}
    assert part_of(path).measure({"R": 1}, measure) == {"per_s": 1}
    late = part_of(path, end_s=0.0)
    assert late.measure({"R": 1}, measure) == {"per_s": 1}
    assert late.measure({"R": 2}, measure) is None
    assert len(calls) == 1
    assert not part_of(path).is_done([{"R": 1}, {"R": 2}]) and late.is_done([{"R": 2}])


def test_only_what_is_wanted_is_measured_and_what_is_old_again(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"per_s": len(calls)}

    path = tmp_path / "rows.json"
    whole = part_of(path)
    only = whole._replace(only=paper.only(["way=time,space", "processes=8,-"]))
    wanted = {"way": "time", "R": 1}
    other, more = {**wanted, "way": "in turn"}, {**wanted, "processes": 16}
    assert only.is_done([other, more, {"R": 1}]) and not only.is_done([other, wanted])
    assert only.measure(other, measure) is None and only.measure(more, measure) is None
    assert only.measure(wanted, measure) == {"per_s": 1}
    assert whole.measure(other, measure) == {"per_s": 2}
    assert only.measure(other, measure) == {"per_s": 2}  # it is there
    day = whole.records.rows[0]["about"]["date"]
    assert whole._replace(since=day).measure(other, measure) == {"per_s": 2}
    again = only._replace(since="9999-01-01")
    assert again.is_done([other]) and not again.is_done([wanted])
    assert again.measure(other, measure) == {"per_s": 2}
    assert again.measure(wanted, measure) == {"per_s": 3} and len(calls) == 3
    assert again._replace(end_s=0.0).measure(wanted, measure) == {"per_s": 3}


def test_processes_have_the_same_models_and_answer_as_these_do_alone(pool):
    members = [("conv2_2", i) for i in range(4)]
    what = {name: GEMM[name] for name in ("scale", "dtype", "precision", "repeat")}
    found = paper.load(pool, members, what)
    assert found["processes"] == 2 and found["difference"] == 0
    tenants = paper.run(pool, 2, 0.3, 2)
    assert [tenant["name"] for tenant in tenants] == [f"conv2_2-{i}" for i in range(4)]
    assert all(len(t["done_s"]) and np.all(t["done_s"] > t["due_s"]) for t in tenants)
    rates = np.array([40.0, 0.0])
    some, none = (paper.run(pool, rates, 0.5, 2)[i] for i in (0, 2))
    assert len(none["due_s"]) == 0 and 5 <= len(some["due_s"]) <= 60
    assert np.all(some["due_s"] >= 0) and np.all(np.diff(some["due_s"]) >= 0)


def test_the_benchmark_prints_its_tables_and_goes_on_where_it_stopped(tmp_path):
    asked = ("-m", "examples.bench_paper", *SMALLEST["bench_paper"])
    first = run(*asked, f"--results={tmp_path}", "--minutes=0")
    assert first.returncode == 0, first.stderr
    assert "time was up" in first.stdout and not list(tmp_path.glob("*.json"))
    whole = run(*asked, f"--results={tmp_path}")
    assert whole.returncode == 0, whole.stderr
    for text in ("conv2_2 16x8x24, float32", "over in turn: ", "over time: ", "drew"):
        assert text in whole.stdout
    assert whole.stdout.count("\n  gemm ") == 3 * (1 + 3 + 2)
    again = run(*asked, f"--results={tmp_path}")
    assert "\n  gemm " not in again.stdout and "over time: " in again.stdout


def test_the_policies_are_measured_and_become_a_table(tmp_path):
    asked = (*SMALLEST["bench_policies"], "--processes=0", f"--results={tmp_path}")
    result = run("-m", "examples.bench_policies", *asked)
    assert result.returncode == 0, result.stderr
    table = figures.policies_table(records.read(tmp_path / "policies.json"))
    assert table in result.stdout
    assert "| space-time |" in table and "| exclusive |" in table
    assert "| time |" not in table  # no processes were wanted


def test_a_worker_says_what_went_wrong_and_goes_on(pool):
    with pytest.raises(RuntimeError, match=r"worker 0 failed: KeyError.*no-such"):
        pool.ask([{**GEMM, "workload": "no-such", "first": 0}])
    assert pool.ask([{"do": "hello"}] * 2)[1]["device"] == "cpu"
    with pytest.raises(RuntimeError, match="worker 0 did not answer in time"):
        pool.ask([{**GEMM, "first": 0}], timeout_s=0.0)
    pool._workers[0].receive(60)  # what it was asked for


def test_a_worker_that_dies_is_told_and_none_is_left():
    with Pool(1, {"JAX_PLATFORMS": "cpu"}) as pool:
        (worker,) = pool._workers
        worker.process.kill()
        with pytest.raises(RuntimeError, match="worker 0 has ended"):
            pool.ask([{"do": "hello"}])
    assert worker.process.poll() is not None
    with pytest.raises(RuntimeError, match="worker 0 failed.*no_such"):
        Pool(1, {"PYTHONPATH": "", "JAX_PLATFORMS": "no_such"}).__enter__().ask([])


def test_a_loop_on_the_device_runs_the_step_so_often_and_answers_the_same():
    workload = workloads.make_paper_workloads(jnp.float32, is_small=True)["square"]
    ((_, params, inputs),) = paper_worker.make_models(workload, 3, 1, "float32")
    kinds = paper_worker.kinds_of(inputs, 16)
    looped = paper_worker.repeated(workload.apply_fn, 16)
    for kind, found in zip(kinds, jax.jit(looped)(params, kinds), strict=True):
        np.testing.assert_array_equal(found, jax.jit(workload.apply_fn)(params, kind))
    np.testing.assert_array_equal(kinds[0], inputs)
    text = jax.jit(looped).lower(params, kinds).compile().as_text()
    (body,) = [
        part for part in re.split(r"\n(?=\S)", text) if part.startswith("%region_0")
    ]
    assert len(re.findall(r" (?:dot|custom-call|fusion|call)\(", body)) >= 8


def test_a_number_means_the_same_model_wherever_it_is_made():
    workload = workloads.make_paper_workloads(jnp.float32, is_small=True)["lstm"]
    many = paper_worker.make_models(workload, 0, 4, "float32")
    (one,) = paper_worker.make_models(workload, 2, 1, "float32")
    for a, b in zip(
        jax.tree.leaves(many[2][1:]), jax.tree.leaves(one[1:]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert many[2][0] == one[0] == "lstm-2"


def test_requests_of_processes_come_at_random_times_of_their_own():
    times, which = paper_worker.arrivals(3, 0, 100.0, 20.0, seed=1)
    assert np.all(np.diff(times) >= 0) and times[-1] < 20
    for i in range(3):
        own = times[which == i]
        assert 1700 < len(own) < 2300
        alone, _ = paper_worker.arrivals(1, i, 100.0, 20.0, seed=1)
        np.testing.assert_array_equal(own, alone)


def test_launches_are_counted_after_the_first_fifth():
    done_s = np.arange(1, 101) / 100
    tenants = [{"done_s": done_s, "due_s": done_s - 0.01}] * 2
    assert paper.per_s(tenants, 1.0) == pytest.approx(200, rel=0.02)
    slow = [{"done_s": np.array([3.0]), "due_s": np.array([0.0])}]
    assert paper.per_s(slow, 1.0) == pytest.approx(1 / 3)
    np.testing.assert_allclose(paper.latencies_s(slow), [3.0])


def test_the_mean_over_every_r_weighs_large_ones_as_often_as_they_are():
    ours, theirs = {1: 1.0, 3: 4.0, 9: 8.0}, {1: 1.0, 3: 1.0, 5: 1.0}
    # R = 1 to 5: 1, 2, 4, and on a line of logarithms from 4 to 8.
    logs = [0, 1, 2, 2 + 1 / 6, 2 + 2 / 6]
    found = paper_gemm.mean_over_every(ours, theirs)
    assert found == pytest.approx(2 ** np.mean(logs))
    assert np.isnan(paper_gemm.mean_over_every(ours, {}))
    assert np.isnan(paper_gemm.mean_over_every(ours, {3: 1.0}))


def test_means_and_break_even_are_of_what_both_have():
    ours, theirs = {1: 1.0, 2: 4.0, 4: 16.0, 8: 9.0}, {1: 2.0, 2: 2.0, 4: 2.0}
    assert paper_gemm.geometric_mean(ours, theirs, 2) == pytest.approx(4.0)
    assert paper_gemm.geometric_mean(ours, theirs) == pytest.approx(8 ** (1 / 3))
    assert np.isnan(paper_gemm.geometric_mean(ours, {}))
    assert paper_gemm.break_even(ours, theirs) == 2
    assert paper_gemm.break_even({1: 3.0}, {1: 1.0}) == 1
    assert paper_gemm.break_even({1: 1.0}, {1: 3.0}) is None


def test_a_wrong_answer_fails_the_benchmark(tmp_path):
    part = part_of(tmp_path / "rows.json")
    part.measure({"R": 1}, lambda: {"difference": 1e-7})
    paper.check(part)
    part.measure({"R": 2}, lambda: {"difference": float("nan")})
    with pytest.raises(SystemExit, match="not the models' own"):
        paper.check(part)


@pytest.mark.parametrize("way", ["space-time", "in turn", "exclusive"])
def test_each_way_in_one_process_answers_as_the_models_alone(tmp_path, way):
    part = part_of(tmp_path / "rows.json")
    members = [("lstm", 0), ("lstm", 1)]
    found = paper_models.in_process(part, members, way)
    assert found["difference"] <= workloads.TOLERANCE["float32"]
    assert found["per_s"] > 0 and found["p99_ms"] >= found["p50_ms"] > 0


def test_the_best_number_of_processes_counts(tmp_path):
    part = part_of(tmp_path / "rows.json")
    key = {"part": "models", "model": "lstm", "R": 64}
    for num, per_s in ((8, 10.0), (16, 30.0), (40, 20.0)):
        own = {**key, "way": "space", "processes": num}
        part.measure(own, lambda per_s=per_s, num=num: {"per_s": per_s, "n": num})
    part.measure({**key, "way": "torch vmap"}, dict)
    assert paper_models.best_of(part, key) == {"space": {"per_s": 30.0, "n": 16}}


def test_models_are_loaded_once_for_all_numbers_of_them(tmp_path, monkeypatch):
    loads = []

    @contextlib.contextmanager
    def pool_of(way, num):
        yield (way, num) if way == "time" else None  # no MPS here

    def hold(part, pool, members, num):
        loads.append((pool, members[0][0], len(members), num))
        return {"processes": num, "bytes": 100.0 * len(members), "difference": 0.0}

    monkeypatch.setattr(paper, "pool_of", pool_of)
    monkeypatch.setattr(paper_models, "hold", hold)
    monkeypatch.setattr(paper_models, "in_pool", lambda part, pool, held: held)
    part, sets = part_of(tmp_path / "rows.json", processes=40), []
    for name, num in (("a", 16), ("b", 4), ("a", 1), ("a", 64)):
        sets.append(({"model": name, "R": num}, [(name, i) for i in range(num)]))
    paper_models.in_pools(part, sets)
    pool, many = ("time", 40), [("a", 64, num) for num in (8, 16, 32, 40)]
    assert loads == [(pool, *of) for of in (("a", 16, 16), ("b", 4, 4), *many)]
    rows = {
        (r["key"]["R"], r["key"]["processes"]): r["values"] for r in part.records.rows
    }
    assert rows[1, 1]["bytes"] == 100 and rows[16, 16]["bytes"] == 1600
    assert rows[64, 8]["bytes"] == 6400 and len(rows) == 7
    paper_models.in_pools(part, sets)
    assert len(loads) == 6  # nothing was missing


class Steady:
    """A way whose first tenant harms the others by what it asks for."""

    def send(self, rates, seconds, seed, *, is_apart=False):
        assert is_apart == (rates[0] > 10)  # the clients of walls, not of spread
        slow_s = 0.002 if rates[0] > 5 * rates[1] else 0.001
        return [np.full(9, slow_s * (1 + 0.1 * i)) for i in range(len(rates))]


def test_walls_and_spread_are_ratios():
    found = paper_predictability.loaded(Steady(), 30.0, 3, 1.0)
    assert found["spread"] == pytest.approx(1.2) and found["rate_per_s"] == 30
    found = paper_predictability.abused(Steady(), 300.0, 3, 1.0)
    assert found["interference"] == pytest.approx(2.0)
    assert found["over_alone"] == pytest.approx(1.2 / 1.1)
