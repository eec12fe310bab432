"""The page that Prometheus scrapes, read by Prometheus' own parser."""

import builtins
import dataclasses
import math

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stfuse._metrics import BucketStats, HostStats, Snapshot, TenantStats
from stfuse.metrics import to_prometheus
from stfuse.testing import FakeDevice, affine_job
from tests.serving import ROW, serve

LABELS = ("tenant", "bucket", "outcome", "quantile", "stage")


def parse(text):
    """Return every sample's value by its name and its labels' values."""
    return {
        (sample.name, *(sample.labels[x] for x in LABELS if x in sample.labels)): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def snapshot(tenants=None, buckets=None, **fields):
    return Snapshot(
        tenants=tenants or {},
        buckets=buckets or {},
        **{
            "steps": 5,
            "served": 7,
            "rows": 9,
            "queued": 2,
            "compiles": 3,
            "tenants_per_step": 1.5,
            "rows_per_step": 1.8,
            "waste": 0.25,
            **fields,
        },
    )


def test_a_snapshots_numbers_are_on_the_page():
    found = parse(
        to_prometheus(
            snapshot(
                {
                    "a": TenantStats(
                        served=4, rows=6, late=1, queue_full=2, p50_s=0.5, p99_s=0.75
                    ),
                    "b": TenantStats(failed=3, queued=2, quarantine="boom"),
                },
                {"all 2x4": BucketStats(5, 0.25, 0.5, prediction_error=1.0)},
                device_s=0.125,
                host=HostStats(stage_s=0.0625),
                restarts=1,
            )
        )
    )
    expected = {
        ("stfuse_up",): 1,
        ("stfuse_steps_total",): 5,
        ("stfuse_rows_total",): 9,
        ("stfuse_compiles_total",): 3,
        ("stfuse_restarts_total",): 1,
        ("stfuse_queued_requests",): 2,
        ("stfuse_tenants_per_step",): 1.5,
        ("stfuse_padding_waste_ratio",): 0.25,
        ("stfuse_step_device_seconds",): 0.125,
        ("stfuse_step_host_seconds", "stage"): 0.0625,
        ("stfuse_step_host_seconds", "decide"): 0.0,
        ("stfuse_requests_total", "a", "served"): 4,
        ("stfuse_requests_total", "a", "queue_full"): 2,
        ("stfuse_requests_total", "b", "failed"): 3,
        ("stfuse_tenant_rows_total", "a"): 6,
        ("stfuse_late_total", "a"): 1,
        ("stfuse_latency_seconds", "a", "0.5"): 0.5,
        ("stfuse_latency_seconds", "a", "0.99"): 0.75,
        ("stfuse_tenant_queued_requests", "b"): 2,
        ("stfuse_quarantined", "a"): 0,
        ("stfuse_quarantined", "b"): 1,
        ("stfuse_bucket_steps_total", "all 2x4"): 5,
        ("stfuse_bucket_predicted_seconds", "all 2x4"): 0.25,
        ("stfuse_bucket_measured_seconds", "all 2x4"): 0.5,
        ("stfuse_bucket_prediction_error_ratio", "all 2x4"): 1.0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert math.isnan(found["stfuse_latency_seconds", "b", "0.5"])


def test_labels_are_bounded_and_the_rest_is_added_up():
    tenants = {
        f"t{i:03}": TenantStats(served=1, rows=i, queued=2, p99_s=i / 1000)
        for i in range(300)
    }
    buckets = {f"lane {i}": BucketStats(i + 1, 0.1, i / 10) for i in range(50)}
    text = to_prometheus(snapshot(tenants, buckets), max_tenants=3)
    found = parse(text)
    labels = {key[1] for key in found if key[0] == "stfuse_tenant_rows_total"}
    assert labels == {"t299", "t298", "t297", "other"}
    assert found["stfuse_tenant_rows_total", "other"] == sum(range(297))
    assert found["stfuse_requests_total", "other", "served"] == 297
    assert found["stfuse_tenant_queued_requests", "other"] == 2 * 297
    assert found["stfuse_latency_seconds", "other", "0.99"] == 0.296
    assert found["stfuse_bucket_steps_total", "other"] == sum(range(1, 48))
    assert found["stfuse_bucket_measured_seconds", "other"] == 4.6
    assert len(text) < 10_000


def test_a_tenant_may_be_called_other():
    tenants = {"other": TenantStats(rows=9), "a": TenantStats(rows=1)}
    found = parse(to_prometheus(snapshot(tenants), max_tenants=2))
    assert found["stfuse_tenant_rows_total", "other"] == 9
    assert found["stfuse_tenant_rows_total", "a"] == 1
    found = parse(to_prometheus(snapshot(tenants), max_tenants=0))
    assert found["stfuse_tenant_rows_total", "other"] == 10


def test_a_served_engine_has_a_page_and_a_lost_one_says_so():
    device = FakeDevice()
    with serve(affine_job("a"), affine_job("b"), device=device) as engine:
        for name in "aab":
            np.testing.assert_array_equal(engine.infer(name, ROW), ROW * 3)
        found = parse(to_prometheus(engine.stats()))
        assert found["stfuse_up",] == 1
        assert found["stfuse_requests_total", "a", "served"] == 2
        assert found["stfuse_rows_total",] == 3
        device.read_error = RuntimeError("gone")
        engine.health(timeout_s=60)
        assert parse(to_prometheus(engine.stats()))["stfuse_up",] == 0


def test_every_outcome_of_a_request_is_on_the_page():
    counted = {f.name for f in dataclasses.fields(TenantStats) if f.type == "int"}
    numbers = {name: i + 1 for i, name in enumerate(sorted(counted))}
    found = parse(to_prometheus(snapshot({"a": TenantStats(**numbers)})))
    values = {value for key, value in found.items() if "a" in key}
    # "rejected" is the sum of its three reasons, "generation" no outcome.
    assert {numbers[n] for n in counted - {"rejected", "generation"}} <= values


def test_a_missing_client_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install stfuse\[metrics\]"):
        to_prometheus(snapshot())


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match="max_tenants is -1"):
        to_prometheus(snapshot(), max_tenants=-1)
