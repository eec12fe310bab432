"""Counts and quantiles against numbers worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stfuse._metrics import Metrics, Quantiles, TenantStats
from stfuse._types import Bucket, StepRecord


def record(rows, slots=(2, 2), max_rows=2, late=None, latency_s=0.1):
    return StepRecord(
        lane="all",
        bucket=Bucket(slots, max_rows),
        step_s=0.5,
        predicted_s=0.25,
        rows=rows,
        latencies_s={name: (latency_s,) * n for name, n in rows.items()},
        late=late or {},
    )


def snapshot(metrics, names="ab"):
    return metrics.snapshot(
        queued=dict.fromkeys(names, 0),
        generations=dict.fromkeys(names, 7),
        lanes=dict.fromkeys(names, "all"),
        compiles=3,
    )


def test_steps_are_folded_into_one_snapshot():
    metrics = Metrics()
    metrics.record(record({"a": 1, "b": 2}, late={"b": 1}))
    metrics.record(record({"a": 1}))
    metrics.count("b", "rejected")
    found = snapshot(metrics)
    assert (found.steps, found.served, found.rows, found.compiles) == (2, 4, 4, 3)
    assert (found.tenants_per_step, found.rows_per_step) == (1.5, 2.0)
    assert found.waste == (8 + 8) / 4 - 1
    assert found.tenants["a"].served == 2
    assert found.tenants["b"].late == 1
    assert found.tenants["b"].rejected == 1
    assert found.tenants["b"].generation == 7
    bucket = found.buckets["all 2+2x2"]
    assert (bucket.steps, bucket.predicted_s, bucket.measured_s) == (2, 0.25, 0.5)


def test_an_empty_engine_has_a_snapshot():
    found = snapshot(Metrics())
    assert (found.steps, found.served, found.waste) == (0, 0, 0.0)
    assert math.isnan(found.tenants["a"].p50_s)


def test_a_tenant_that_left_is_forgotten_but_its_answers_count():
    metrics = Metrics()
    metrics.record(record({"a": 1, "b": 1}))
    metrics.forget("a")
    found = snapshot(metrics, "b")
    assert set(found.tenants) == {"b"}
    assert found.served == 2


def test_records_do_not_pile_up_unread():
    metrics = Metrics()
    for _ in range(5000):
        metrics.record(record({"a": 1}))
    assert len(metrics._records) < 1024
    assert snapshot(metrics).steps == 5000


def test_every_counter_is_a_field_of_the_tenants_stats():
    metrics = Metrics()
    kinds = ("expired", "rejected", "failed", "cancelled")
    for kind in kinds:
        metrics.count("a", kind, 2)
    assert all(getattr(snapshot(metrics).tenants["a"], kind) == 2 for kind in kinds)
    with pytest.raises(AttributeError):
        TenantStats().served = 1


@given(
    st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200),
    st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_a_quantile_is_at_most_five_percent_too_high(numbers, q):
    quantiles = Quantiles()
    for x in numbers:
        quantiles.add(x)
    true = sorted(numbers)[math.ceil(q * len(numbers)) - 1]
    assert true * (1 - 1e-9) <= quantiles.quantile(q) <= true * 1.0501
