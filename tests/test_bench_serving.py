"""The serving benchmark runs at its smallest size; its arithmetic is done by hand."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from examples import fleet, goals, load, streams, workloads
from stfuse.testing import FakeDevice, affine_job
from tests.test_examples import SMALLEST

ROOT = pathlib.Path(__file__).parents[1]
QUICK = (*SMALLEST["bench_serving"], "--seconds=0.2", "--loads=0.5,2", "--rounds=1")
QUICK += ("--max_batch_size=2", "--rows=2")
TARGETS = [load.Target("a", [10, 11]), load.Target("b", [20, 21])]


def run(*arguments, how="-m"):
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:stfuse", how, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


class HandEngine:
    """Answers at once; every submit takes its time on a clock of its own."""

    def __init__(self, submit_s, outcomes=()):
        self.now_s, self.submit_s = 100.0, submit_s
        self.outcomes, self.asked = list(outcomes), []

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        assert seconds > 0
        self.now_s += seconds

    def submit(self, name, inputs, *, deadline_s):
        self.asked.append((name, inputs, deadline_s))
        self.now_s += self.submit_s
        outcome = self.outcomes.pop(0) if self.outcomes else inputs
        if isinstance(outcome, stfuse.QueueFullError):
            raise outcome
        future = Future()
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return future


def sent(engine, due_s, deadline_s, **more):
    stream = streams.Stream(np.array(due_s), np.array([0, 1, 0]), np.array([0, 1, 1]))
    own = {"clock": engine.clock, "sleep": engine.sleep} | more
    return load.replay(engine, TARGETS, stream, deadline_s, **own)


def made(due_s, latency_s, sent_s=None):
    due_s, latency_s = np.array(due_s, float), np.array(latency_s, float)
    number = np.arange(len(due_s))
    stream = streams.Stream(due_s, number % 2, number % 2)
    sent_s = due_s if sent_s is None else np.array(sent_s)
    outputs = [np.ones(1) if np.isfinite(x) else None for x in latency_s]
    return load.Run(stream, sent_s, latency_s, outputs, 100.0, 0.0)


def test_latency_and_deadline_count_from_the_intended_time_when_the_sender_stalls():
    engine = HandEngine(submit_s=0.25)
    found = sent(engine, [0.0, 0.1, 0.2], deadline_s=0.5)
    # Each submit takes 0.25 s: they are sent at 0, 0.25, 0.5, answered at 0.25 ...
    np.testing.assert_allclose(found.sent_s, [0.0, 0.25, 0.5])
    np.testing.assert_allclose(found.latency_s, [0.25, 0.4, 0.55])
    names, inputs, deadlines_s = zip(*engine.asked, strict=True)
    assert names == ("a", "b", "a") and inputs == (10, 21, 11)
    np.testing.assert_allclose(deadlines_s, [0.5, 0.35, 0.2])
    assert found.outputs == [10, 21, 11]
    assert found.start_s == 100.0 + load.LEAD_S


def test_outputs_may_be_dropped_as_they_come_but_no_time_and_no_error():
    engine = HandEngine(submit_s=0.25)
    found = sent(engine, [0.0, 0.1, 0.2], deadline_s=0.5, keep_every=2)
    assert found.outputs == [10, None, 11]
    np.testing.assert_allclose(found.latency_s, [0.25, 0.4, 0.55])
    late = HandEngine(0.25, outcomes=[stfuse.DeadlineError("late")] * 3)
    found = sent(late, [0.0, 0.1, 0.2], deadline_s=0.5, keep_every=2)
    assert found.outputs == [None] * 3 and not found.is_answered.any()


def test_what_can_no_longer_be_in_time_is_not_sent_but_counted():
    engine = HandEngine(submit_s=0.25)
    found = sent(engine, [0.0, 0.1, 0.2], deadline_s=0.25)
    assert len(engine.asked) == 2
    assert np.isnan(found.sent_s).tolist() == [False, False, True]
    summary = load.summarize(found, 0.25, 0.0, 1.0)
    assert (summary.offered, summary.unsent) == (3, 1 / 3)
    assert summary.goodput_per_s == 1 and summary.late == 1 / 3 and summary.shed == 0


def test_a_sender_in_time_sleeps_until_each_is_due():
    engine = HandEngine(submit_s=0.01)
    found = sent(engine, [0.1, 0.3, 0.7], deadline_s=None)
    np.testing.assert_allclose(found.sent_s, [0.1, 0.3, 0.7])
    np.testing.assert_allclose(found.latency_s, [0.01] * 3)
    assert [deadline_s for *_, deadline_s in engine.asked] == [None] * 3


def test_refused_and_expired_are_shed_and_any_other_error_is_raised():
    outcomes = [stfuse.QueueFullError("full"), stfuse.DeadlineError("late"), 5]
    found = sent(HandEngine(0.01, outcomes), [0.0, 0.1, 0.2], deadline_s=1.0)
    assert found.is_answered.tolist() == [False, False, True]
    summary = load.summarize(found, 1.0, 0.0, 0.5)
    assert summary.shed == 2 / 3 and summary.unsent == summary.late == 0
    with pytest.raises(stfuse.DeviceError, match="gone"):
        sent(HandEngine(0.01, [stfuse.DeviceError("gone")]), [0.0, 0.1, 0.2], 1.0)


def test_a_window_leaves_the_warm_up_out_and_counts_answers_where_they_were_given():
    nan, inf = float("nan"), float("inf")
    found = made(
        due_s=[0.5, 0.9, 1.0, 1.2, 1.4, 1.6, 2.9, 3.0],
        latency_s=[9.0, 0.3, 0.1, 0.5, inf, inf, 0.2, 0.1],
        sent_s=[0.5, 0.9, 1.0, 1.25, 1.4, nan, 2.9, 3.0],
    )
    summary = load.summarize(found, 0.4, 1.0, 3.0)
    assert summary.offered == 5 and summary.offered_per_s == 2.5
    assert summary.answered_per_s == 3 / 2  # at 1.2, 1.1 and 1.7; not 9.5, 3.1, 3.1
    assert summary.goodput_per_s == 2 / 2  # due at 1.0 and 2.9
    assert (summary.late, summary.shed, summary.unsent) == (0.2, 0.2, 0.2)
    assert (summary.p50_ms, summary.p99_ms) == (200.0, 500.0)
    assert summary.lag_ms == pytest.approx(50.0)
    only = load.summarize(found, 0.4, 1.0, 3.0, np.arange(8) == 3)
    assert (only.offered, only.late, only.p50_ms) == (1, 1.0, 500.0)


def test_percentiles_are_values_that_were_seen():
    values = np.arange(1000, 0, -1.0)
    assert load.percentiles(values).tolist() == [500, 990, 999]
    assert load.percentiles(np.array([7.0])).tolist() == [7, 7, 7]
    assert np.isnan(load.percentiles(np.array([]))).all()


def test_a_stream_has_one_shape_at_every_rate_and_the_burstiness_asked_for():
    shares = streams.zipf(10, seed=3)
    assert shares.sum() == pytest.approx(1)
    assert shares.max() == pytest.approx(2 * np.sort(shares)[-2])
    assert np.allclose(streams.zipf(4, seed=3, exponent=0.0), 0.25)
    make = partial(streams.make_stream, shares=shares, num_inputs=7, seed=5)
    slow, fast = [make(rate, 20_000 / rate, cv=3.0) for rate in (10.0, 1000.0)]
    np.testing.assert_allclose(slow.due_s, 100 * fast.due_s)
    assert np.array_equal(slow.tenants, fast.tenants)
    assert np.array_equal(slow.rows, fast.rows) and set(slow.rows) == set(range(7))
    counts = np.bincount(slow.tenants, minlength=10) / 20_000
    np.testing.assert_allclose(counts, shares, atol=0.02)
    for cv in (1.0, 3.0):
        gaps_s = np.diff(make(10.0, 2000.0, cv=cv).due_s, prepend=0.0)
        assert gaps_s.mean() == pytest.approx(0.1, rel=0.1)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.1)


def test_a_closed_loop_asks_tenants_in_turn():
    stream = streams.in_turn(7, num_tenants=2, num_inputs=3)
    assert stream.tenants.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert stream.rows.tolist() == [0, 0, 1, 1, 2, 2, 0]


def test_clients_send_side_by_side_and_get_their_own_answers():
    rows = [np.full((1, 3), value, np.float32) for value in range(4)]
    targets = [load.Target(name, rows) for name in "ab"]
    with stfuse.Engine(device=FakeDevice(), max_batch_size=2) as engine:
        jobs = [affine_job("a", shift=0.0), affine_job("b", shift=100.0)]
        for ready in [engine.add(job) for job in jobs]:
            ready.result(60)
        due_s = np.arange(20) / 1000
        own = [streams.Stream(due_s, np.full(20, t), np.arange(20) % 4) for t in (0, 1)]
        runs = load.replay_all(engine, targets, own, None)
    assert runs[0].start_s == runs[1].start_s
    for run_, shift in zip(runs, (0, 100), strict=True):
        assert run_.is_answered.all()
        given = [output[0, 0] for output in run_.outputs]
        assert given == [shift + 2 * (i % 4) for i in range(20)]


class Slow:
    """An engine that answers each request after a while, and counts those it has."""

    def __init__(self, answer_s):
        self.answer_s, self.outstanding, self.most = answer_s, 0, 0

    def submit(self, name, inputs, *, deadline_s=None):
        self.outstanding += 1
        self.most = max(self.most, self.outstanding)
        future = Future()
        threading.Timer(self.answer_s, self.answer, [future]).start()
        return future

    def answer(self, future):
        self.outstanding -= 1
        future.set_result(0.0)


@pytest.mark.parametrize("answer_s", [0.002, 1.0])
def test_a_client_has_no_more_outstanding_than_it_may(answer_s):
    stream = streams.Stream(np.arange(20) / 100, np.zeros(20, int), np.zeros(20, int))
    engine, own = Slow(answer_s), load._Sender
    wrapped = {"autospec": True, "side_effect": own.has_room}
    with mock.patch.object(own, "has_room", **wrapped) as asked:
        (run_,) = load.replay_all(engine, TARGETS, [stream], None, 1, [2])
    num = 20 if answer_s < 0.1 else 2  # the others: too late
    assert engine.most <= 2 and run_.is_answered.sum() == num
    assert np.isnan(run_.sent_s).sum() == 20 - num
    assert asked.call_count == min(num + 1, 20)  # others need the interpreter
    assert sum(run_.latency_s[run_.is_answered] < answer_s) == 0


def test_a_client_that_skips_a_request_may_send_the_next():
    stream = streams.Stream(np.arange(9) / 1e6, np.zeros(9, int), np.zeros(9, int))
    late = {"sleep": lambda _: time.sleep(0.02), "in_flight": 1}
    run_ = load.replay(Slow(0.0), TARGETS, stream, 0.01, **late)
    assert not run_.is_answered.any() and np.isnan(run_.sent_s).all()


def test_a_fleet_notices_answers_that_are_not_its_models_own():
    workload = workloads.make_workloads(jnp.float32, is_small=True)["mlp"]
    own = fleet.make_fleet(workload, 2, 3, jnp.float32)
    assert own.alone.shape[:2] == (2, fleet.NUM_INPUTS)
    assert {x.shape[0] for target in own.targets for x in target.inputs} == {3}
    tenants, rows = np.array([0, 1, 1]), np.array([2, 0, 5])
    outputs = [
        np.asarray(own.jobs[t].apply_fn(own.jobs[t].params, own.targets[t].inputs[r]))
        for t, r in zip(tenants, rows, strict=True)
    ]
    assert own.difference(tenants, rows, outputs) < 1e-5
    assert own.difference(tenants, rows, [outputs[0], None, outputs[2]]) < 1e-5
    assert own.difference(tenants, rows, [None] * 3) == 0
    assert own.difference(tenants, rows, [outputs[1], None, None]) > 0.01
    assert own.difference(tenants, rows, [outputs[0] * np.nan, None, None]) == np.inf


def test_a_bare_step_is_of_the_bucket_that_the_engine_used():
    assert goals.slots_and_rows("all 16+8x4") == (24, 4)
    assert goals.slots_and_rows("lane of two words 64x1") == (64, 1)
    workload = workloads.make_workloads(jnp.float32, is_small=True)["mlp"]
    own = fleet.make_fleet(workload, 3, 1, jnp.float32)
    bare = goals.bare_step(own, 4, 2, seconds=0.01)
    assert (bare["slots"], bare["rows"]) == (3, 2)
    assert bare["rows_per_s"] == pytest.approx(6 / bare["step_s"])


def options(**changed):
    told = {"seconds": 2.0, "warm_s": 1.0, "seed": 0, "report": lambda run: None}
    return goals.Options(**(told | changed))


def test_the_step_goals_are_ratios_to_the_bare_step(monkeypatch):
    workload = workloads.make_workloads(jnp.float32, is_small=True)["mlp"]
    own = fleet.make_fleet(workload, 2, 4, jnp.float32)
    saturated, loaded, rates = made([0.0], [0.1]), made([1.5, 1.6], [0.002, 0.003]), []
    bare = {"step_s": 0.0005, "latency_s": 0.001, "rows_per_s": 800.0}
    monkeypatch.setattr(goals, "capacity", lambda *_: (saturated, "all 2x4"))
    monkeypatch.setattr(
        goals, "bare_step", lambda fleet, k, b, s: bare | {"at": (k, b)}
    )
    monkeypatch.setattr(goals, "replay", lambda e, t, stream, d, **_: loaded)
    monkeypatch.setattr(
        goals, "make_stream", lambda rate, *_: rates.append(rate) or loaded.stream
    )

    stats = [
        SimpleNamespace(
            steps=num,
            host=stfuse.HostStats(decide_s=each_s),
            tenants_per_step=1.5,
            buckets={"all 2x4": SimpleNamespace(steps=num, measured_s=0.0006)},
        )
        for num, each_s in ((1, 1e-6), (9, 1e-5), (9, 1e-5), (12, 1e-5))
    ]
    engine = SimpleNamespace(stats=lambda: stats.pop(0))
    found = goals.against_bare(engine, own, 16, options())
    assert found["bare"]["at"] == (2, 4)
    assert found["ratio"] == 100.0 * 4 / 800  # requests/s, rows of each, bare rows/s
    assert rates == [70.0]
    assert found["p99_steps"] == pytest.approx(6) and found["p99_latencies"] == 3
    assert found["steps"] == {"all 2x4": 3}


def test_tenants_of_steps_between_two_snapshots():
    before = SimpleNamespace(steps=10, tenants_per_step=2.0)
    after = SimpleNamespace(steps=30, tenants_per_step=4.0)
    assert goals.tenants_per_step(before, after) == (120 - 20) / 20
    assert goals.tenants_per_step(before, before) == 0


def test_isolation_compares_the_others_beside_either_tenant(monkeypatch):
    seen = []

    def replay_all(engine, targets, both, deadline_s, keep_every):
        seen.append(both)
        others, first = both
        slow = 0.003 if len(first.due_s) > len(others.due_s) else 0.002
        return [
            load.Run(s, s.due_s, np.full(len(s.due_s), own_s), [], 1.0, 0.0)
            for s, own_s in ((others, slow), (first, 9.0))
        ]

    monkeypatch.setattr(goals, "replay_all", replay_all)
    workload = workloads.make_workloads(jnp.float32, is_small=True)["mlp"]
    own = fleet.make_fleet(workload, 4, 1, jnp.float32)
    found = goals.isolation(None, own, 400.0, 0.1, 2, options())
    assert found["ratio"] == pytest.approx(1.5)
    assert [len(found[case]) for case in ("peaceful", "abusive")] == [2, 2]
    # Share 100/s: three others at half of it for 2 s, the first at 0.5 and at 10.
    assert [len(others.due_s) for others, _ in seen] == [300] * 4
    assert [len(first.due_s) for _, first in seen] == [100, 2000, 100, 2000]
    assert all(np.array_equal(seen[0][0].due_s, others.due_s) for others, _ in seen)
    assert {*seen[0][0].tenants} == {1, 2, 3} and {*seen[1][1].tenants} == {0}


def test_a_join_lasts_until_it_is_ready_or_the_stream_ends():
    due_s = np.arange(400) / 100
    latency_s = np.select([due_s < 2, due_s < 2.1], [0.001, 0.01], 0.002)

    def joined(*marks):
        marks = np.array(marks).reshape(-1, 2)
        return goals.joined(made(due_s, latency_s), marks, 1.0, 4.0)

    found = joined(2.0, 2.05)
    assert found["ready_s"] == pytest.approx(0.05) and found["during_s"] == 0.5
    assert found["ratio"] == pytest.approx(10)
    found = joined(2.2, 3.2)
    assert found["before"]["offered"] == 120 and found["during"]["offered"] == 100
    found = joined(2.2, np.inf)
    assert found["ready_s"] is None and found["during_s"] == pytest.approx(1.8)
    found = joined(1.5, 1.52, 2.5, 2.6, 3.9, 3.95)
    assert found["times"] == 3 and found["during"]["offered"] == 50 + 50 + 10


def test_the_benchmark_of_serving_checks_prints_saves_and_draws(tmp_path):
    saved, picture = tmp_path / "serving.json", tmp_path / "serving.png"
    asked = ("--measure=sweep,step,isolation,join,loadgen", "--search_steps=1")
    files = (f"--save={saved}", f"--plot={picture}")
    result = run("examples.bench_serving", *QUICK, *asked, *files)
    assert result.returncode == 0, result.stdout + result.stderr
    for word in (
        *("exclusive", "goal 0.80", "goal 3.0", "goal 1.10", "goal 1.25"),
        *("free slot", "full lane", "largest valid rate", "no MLPerf results"),
    ):
        assert word in result.stdout
    found = json.loads(saved.read_text(), parse_constant=pytest.fail)
    assert set(found["policies"]) == {"exclusive", "time", "space-time"}
    for each in found["policies"].values():
        assert set(each["loads"]) == {"0.5", "2"}
        assert each["capacity_per_s"] > 0 and each["loads"]["0.5"]["offered"] > 0
    assert set(found["policies"]["space-time"]) >= {"isolation", "join", "loadgen"}
    assert found["policies"]["space-time"]["step"]["ratio"] > 0
    assert picture.stat().st_size > 10_000


def test_a_wrong_answer_ends_in_a_failure():
    code = (
        "from absl import app; from examples import bench_serving, workloads; "
        "workloads.TOLERANCE['float32'] = -1; app.run(bench_serving.main)"
    )
    result = run(code, *QUICK, "--measure=sweep", "--policy=time", how="-c")
    assert result.returncode == 1
    assert "an answer is not its model's own" in result.stderr


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--workload=vgg", "there are resnet50"),
        ("--measure=speed", "there are sweep"),
        ("--loads=1,many", "pass numbers above 0"),
        ("--loads=0", "pass numbers above 0"),
        ("--newcomer=bert", "bert takes other inputs"),
        ("--rows=5", "at most --max_batch_size=4"),
    ],
)
def test_a_wrong_flag_is_refused_at_once(flag, told):
    result = run("examples.bench_serving", "--scale=small", flag)
    assert result.returncode == 1
    assert told in result.stderr and "Traceback" not in result.stderr
