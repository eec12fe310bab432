"""The simulator: arrivals of many shapes, results by hand, what policies promise."""

import numpy as np
import pytest

from stfuse.testing import (
    Arrivals,
    diurnal,
    flash_crowd,
    poisson,
    read_arrivals,
    simulate,
    varying,
    zipf_shares,
)
from tests.test_failures_scheduler import CAPACITY, TABLE


def trace_of(*rows):
    """Return arrivals from pairs of time and tenant."""
    due_s, tenants = zip(*rows, strict=True)
    return Arrivals(np.array(due_s), np.array(tenants))


def test_a_run_worked_out_by_hand():
    trace = trace_of((0.0, 0), (0.1, 1), (0.2, 1), (5.0, 0))
    run = simulate(trace, {(1, 1): 1.0, (2, 1): 1.5})
    # 0 alone until 1.0; meanwhile 1's first (two are in flight); then its second.
    np.testing.assert_allclose(run.latency_s, [1.0, 1.9, 2.8, 1.0])
    np.testing.assert_allclose(run.service_s, [2.0, 2.0])
    assert run.steps == 4
    assert run.tenants_per_step == 1.0
    assert run.end_s == 6.0
    assert run.fairness() == pytest.approx(1.0)
    assert run.goodput == pytest.approx(4 / 6)


def test_what_waits_together_shares_a_step():
    trace = trace_of((0.0, 0), (0.0, 1), (0.0, 2))
    run = simulate(trace, {(1, 1): 1.0, (4, 1): 1.2})
    np.testing.assert_allclose(run.latency_s, 1.2)
    assert run.steps == 1
    in_turn = simulate(trace, {(1, 1): 1.0, (4, 1): 1.2}, "time")
    np.testing.assert_allclose(in_turn.latency_s, [1.0, 2.0, 3.0])


def test_two_are_fused_only_where_that_pays():
    trace = trace_of((0.0, 0), (0.0, 1))
    assert simulate(trace, {(1, 1): 1.0, (2, 1): 2.1}).steps == 2
    assert simulate(trace, {(1, 1): 1.0, (2, 1): 1.9}).steps == 1


def test_deadlines_are_counted_apart():
    # The first runs until 1.0, the second could start by 1.2, but not end by then;
    # the third would be too late even to start.
    trace = trace_of((0.0, 0), (0.0, 0), (0.1, 1))
    run = simulate(trace, {(1, 1): 1.0}, deadline_s=1.2)
    assert (run.in_time, run.expired) == (1, 2)
    busy = trace_of((0.0, 0), (0.5, 1))
    run = simulate(busy, {(1, 1): 1.0}, deadline_s=0.4)
    assert (run.late, run.shed) == (1, 1)  # alone, it may start; later is no use
    assert run.misses == 1.0


def test_a_full_queue_refuses():
    trace = trace_of(*[(0.0, 0)] * 5)
    run = simulate(trace, {(1, 1): 1.0}, max_queue_size=3)
    assert run.answered + run.refused == 5
    assert run.refused == 2


@pytest.mark.parametrize("policy", ["exclusive", "time", "space-time"])
def test_noise_is_reproducible(seed, policy):
    trace = poisson(2000.0, 500, 8, seed=seed)
    runs = [simulate(trace, TABLE, policy, noise=0.2, seed=s) for s in (1, 1, 2)]
    assert (runs[0].latency_s == runs[1].latency_s).all()
    assert (runs[0].latency_s != runs[2].latency_s).any()


@pytest.mark.parametrize("cv", [1.0, 4.0, 8.0])
def test_arrivals_have_the_rate_and_the_spread_asked_for(seed, cv):
    trace = poisson(100.0, 200_000, 5, seed=seed, cv=cv)
    gaps = np.diff(trace.due_s)
    assert gaps.mean() == pytest.approx(0.01, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert set(trace.tenants) == set(range(5))


def test_tenants_follow_zipfs_law():
    shares = zipf_shares(4, 1.0)
    np.testing.assert_allclose(shares, np.array([12, 6, 4, 3]) / 25)
    np.testing.assert_allclose(zipf_shares(3, 0.0), 1 / 3)


def test_rates_follow_a_curve(seed):
    unit = poisson(1.0, 100_000, 3, seed=seed)
    trace = varying(unit, [0.0, 10.0, 20.0], [1000.0, 1000.0, 3000.0])
    assert (np.diff(trace.due_s) >= 0).all()

    def rate(start_s, end_s):
        inside = (trace.due_s >= start_s) & (trace.due_s < end_s)
        return inside.sum() / (end_s - start_s)

    assert rate(0, 10) == pytest.approx(1000, rel=0.05)
    assert rate(10, 20) == pytest.approx(2000, rel=0.05)
    assert rate(20, 25) == pytest.approx(3000, rel=0.05)


def test_days_and_crowds(seed):
    unit = poisson(1.0, 40_000, 3, seed=seed)
    day = diurnal(unit, 10.0, 1000.0, 0.9)
    assert ((day.due_s % 10.0) < 5.0).mean() > 0.7
    crowd = flash_crowd(unit, 5.0, 1.0, 1000.0, 8000.0)
    during = ((crowd.due_s >= 5.0) & (crowd.due_s < 6.0)).sum()
    assert during == pytest.approx(8000, rel=0.05)


def test_arrivals_are_read_from_a_file(tmp_path):
    path = tmp_path / "arrivals.csv"
    path.write_text("tenant,timestamp\nb,12.5\na,10\nb,11\n")
    trace = read_arrivals(str(path))
    np.testing.assert_allclose(trace.due_s, [0.0, 1.0, 2.5])
    assert trace.tenants.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,tenant\n1,a\n", "needs 'timestamp' and 'tenant'"),
        ("timestamp,tenant\nsoon,a\n", "line 2: timestamp is 'soon'"),
        ("timestamp,tenant\n1,a\nnan,a\n", "line 3: timestamp is 'nan'"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, text, message):
    path = tmp_path / "arrivals.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_arrivals(str(path))


@pytest.mark.parametrize(
    ("trace", "table", "policy", "message"),
    [
        (trace_of((0.0, 0)), {(2, 1): 1.0}, "time", "bucket of one slot"),
        (trace_of((0.0, 0)), {(1, 1): 0.0}, "time", "must be > 0"),
        (trace_of((1.0, 0), (0.0, 0)), {(1, 1): 1.0}, "time", "ascending"),
        (trace_of((0.0, 0)), {(1, 1): 1.0}, "fifo", "policy is 'fifo'"),
    ],
)
def test_what_cannot_be_simulated_is_refused(trace, table, policy, message):
    with pytest.raises(ValueError, match=message):
        simulate(trace, table, policy)


ONE = trace_of((0.0, 0), (1.0, 2))


@pytest.mark.parametrize(
    ("trace", "options", "message"),
    [
        (
            trace_of((0.0, 0), (np.nan, 0)),
            {},
            "request 1 .* due at nan s; all .* finite",
        ),
        (trace_of((0.0, 0), (np.inf, 0)), {}, "request 1 .* due at inf s"),
        (trace_of((0.0, -1)), {}, "tenant -1 .*whole numbers from 0"),
        (trace_of((0.0, 0.5)), {}, "tenant 0.5"),
        (ONE, {"num_tenants": 2}, "num_tenants is 2; .* up to 2: pass .* >= 3"),
        (ONE, {"num_tenants": 0}, "num_tenants is 0"),
        (ONE, {"num_tenants": 3.5}, "num_tenants is 3.5"),
        (ONE, {"weights": [1, 1]}, "found 2 weights for 3 tenants"),
        (ONE, {"weights": [1] * 4}, "found 4 weights for 3 tenants"),
        (ONE, {"weights": [1, 0, 1]}, "weights are .1, 0, 1.; all must be > 0"),
        (ONE, {"weights": [1, -1, 1]}, "weights are"),
        (ONE, {"weights": [1, np.nan, 1]}, "weights are"),
        (ONE, {"deadline_s": np.nan}, "deadline_s is nan"),
    ],
)
def test_a_trace_and_its_tenants_must_fit(trace, options, message):
    with pytest.raises(ValueError, match=message):
        simulate(trace, {(1, 1): 1.0}, **options)


def test_there_may_be_tenants_that_ask_nothing():
    run = simulate(ONE, {(1, 1): 1.0}, num_tenants=5, weights=(1, 2, 3, 4, 5))
    assert run.answered == 2 and len(run.service_s) == 5


@pytest.mark.parametrize("rate", [0, -1.0, np.nan, np.inf])
def test_a_rate_must_be_above_zero(rate):
    with pytest.raises(ValueError, match="`poisson`: rate is"):
        poisson(rate, 5, 1, seed=0)
    with pytest.raises(ValueError, match="`poisson`: cv is"):
        poisson(1.0, 5, 1, seed=0, cv=rate)
    trace = poisson(1.0, 5, 1, seed=0)
    with pytest.raises(ValueError, match="`varying`: rate is"):
        varying(trace, [0, 1], [1, rate])


def test_space_time_misses_at_most_a_tenth_of_what_time_misses(seed):
    options = {"deadline_s": 0.004, "num_tenants": 64}
    rate = 0.9 / TABLE[1, 1]  # of what ``time`` can serve at all
    trace = poisson(rate, 20_000, 64, seed=seed, exponent=1.0)
    time = simulate(trace, TABLE, "time", **options)
    fused = simulate(trace, TABLE, "space-time", **options)
    assert time.misses > 0.01
    assert fused.misses <= time.misses / 10
    # And where fusing is at 90%, the other has long been lost.
    trace = poisson(0.9 * CAPACITY, 20_000, 64, seed=seed, exponent=1.0)
    assert simulate(trace, TABLE, "time", **options).misses > 0.9
    assert simulate(trace, TABLE, "space-time", **options).misses < 0.09


def test_tenants_of_equal_rates_wait_for_two_or_three_full_steps(seed):
    # Steps of 16 slots are nearly as good by the row as those of 64, but at 70% load
    # slower than requests come: what waits grows until the step of all pays.
    uneven = {8: 1.25, 16: 1.25, 32: 1.4}
    table = {
        (k, 1): 1e-3 * (0.4 + 0.111 * k) * uneven.get(k, 1.0)
        for k in (1, 2, 4, 8, 16, 32, 64)
    }
    step_s = table[64, 1]
    for load in (0.7, 0.9):
        trace = poisson(load * 64 / step_s, 12_000, 64, seed=seed)
        assert simulate(trace, table).quantile_s(0.99) <= 3 * step_s


def test_ten_thousand_tenants(seed):
    trace = poisson(0.9 * CAPACITY, 20_000, 10_000, seed=seed, exponent=1.0)
    run = simulate(trace, TABLE, deadline_s=0.02, num_tenants=10_000)
    assert run.misses == 0
    assert run.tenants_per_step > 10
