"""Engine snapshots for Prometheus; needs the extra ``metrics`` (prometheus-client).

Example:
    >>> import stfuse
    >>> from stfuse.metrics import to_prometheus
    >>> with stfuse.Engine() as engine:
    ...     text = to_prometheus(engine.stats())
    >>> "stfuse_steps_total 0.0" in text
    True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stfuse._metrics import BucketStats, Snapshot, TenantStats

__all__ = ["to_prometheus"]

_OTHER = "other"
_OUTCOMES = (
    "served",
    "queue_full",
    "predicted_miss",
    "unavailable",
    "expired",
    "failed",
    "cancelled",
)
_NUMBERS = (  # of a snapshot: its field, its metric, what it is
    ("queued", "queued_requests", "Requests waiting"),
    ("tenants_per_step", "tenants_per_step", "Mean number of tenants in a step"),
    ("rows_per_step", "rows_per_step", "Mean number of true rows in a step"),
    ("waste", "padding_waste_ratio", "Computed rows over true rows, minus one"),
    ("device_s", "step_device_seconds", "Mean device time of a step"),
)
_COUNTS = (
    ("steps", "steps", "Steps run"),
    ("rows", "rows", "Rows answered"),
    ("compiles", "compiles", "Steps compiled, off the request path"),
    ("restarts", "restarts", "Times that the serving loop began anew"),
)
_BUCKET_NUMBERS = (
    ("predicted_s", "bucket_predicted_seconds", "Mean predicted step time"),
    ("measured_s", "bucket_measured_seconds", "Mean measured step time"),
    ("prediction_error", "bucket_prediction_error_ratio", "Mean prediction error"),
)


def to_prometheus(snapshot: Snapshot, *, max_tenants: int = 100) -> str:
    """Return a snapshot in Prometheus' text format.

    The number of label values is bounded: the tenants (and the buckets) with the most
    rows (steps) have their own, all the rest are one, "other": their counts are summed,
    of their latencies and step times the worst is shown.

    Args:
        snapshot: from `stfuse.Engine.stats`.
        max_tenants: most tenants, and most buckets, with a label of their own.

    Returns:
        The page that a scrape answers with.

    Raises:
        ImportError: prometheus-client is missing.
        ValueError: ``max_tenants`` is negative.
    """
    if max_tenants < 0:
        raise ValueError(
            f"`stfuse.metrics.to_prometheus`: max_tenants is {max_tenants}; pass a "
            f"number >= 0."
        )
    try:
        from prometheus_client import CollectorRegistry, core, generate_latest
    except ImportError as error:
        raise ImportError(
            "`stfuse.metrics.to_prometheus`: prometheus-client is missing; install it "
            "with `pip install stfuse[metrics]`."
        ) from error

    class Page:
        """All families of one snapshot."""

        def collect(self) -> Iterable[Any]:
            yield from _engine_families(core, snapshot)
            yield from _tenant_families(core, snapshot.tenants, max_tenants)
            yield from _bucket_families(core, snapshot.buckets, max_tenants)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Page())  # pyright: ignore[reportArgumentType]
    return generate_latest(registry).decode()


def _engine_families(core: Any, snapshot: Snapshot) -> Iterable[Any]:
    is_up = not snapshot.problem
    yield core.GaugeMetricFamily("stfuse_up", "Whether requests are taken", is_up)
    for field, name, text in _COUNTS:
        value = getattr(snapshot, field)
        yield core.CounterMetricFamily(f"stfuse_{name}", text, value)
    for field, name, text in _NUMBERS:
        yield core.GaugeMetricFamily(f"stfuse_{name}", text, getattr(snapshot, field))
    host = core.GaugeMetricFamily(
        "stfuse_step_host_seconds", "Mean host time of a step", labels=["stage"]
    )
    for stage in ("decide", "stage", "launch", "answer", "fold"):
        host.add_metric([stage], getattr(snapshot.host, f"{stage}_s"))
    yield host


def _tenant_families(
    core: Any, tenants: Mapping[str, TenantStats], limit: int
) -> Iterable[Any]:
    groups = _grouped(tenants, lambda one: one.rows, limit)
    requests = core.CounterMetricFamily(
        "stfuse_requests", "Requests by outcome", labels=["tenant", "outcome"]
    )
    latency = core.GaugeMetricFamily(
        "stfuse_latency_seconds", "Latency of answers", labels=["tenant", "quantile"]
    )
    families = {
        name: kind(f"stfuse_{name}", text, labels=["tenant"])
        for kind, name, text in (
            (core.CounterMetricFamily, "tenant_rows", "Rows answered"),
            (core.CounterMetricFamily, "late", "Answers after their deadline"),
            (core.CounterMetricFamily, "evictions", "Moves to a lane of its own"),
            (core.GaugeMetricFamily, "tenant_queued_requests", "Requests waiting"),
            (core.GaugeMetricFamily, "quarantined", "Tenants in quarantine"),
        )
    }
    for label, group in groups.items():
        for outcome in _OUTCOMES:
            total = sum(getattr(one, outcome) for one in group)
            requests.add_metric([label, outcome], total)
        for q, field in (("0.5", "p50_s"), ("0.99", "p99_s")):
            latency.add_metric([label, q], _worst(getattr(x, field) for x in group))
        families["tenant_rows"].add_metric([label], sum(x.rows for x in group))
        families["late"].add_metric([label], sum(x.late for x in group))
        families["evictions"].add_metric([label], sum(x.evictions for x in group))
        queued = sum(x.queued for x in group)
        families["tenant_queued_requests"].add_metric([label], queued)
        held = sum(x.quarantine is not None for x in group)
        families["quarantined"].add_metric([label], held)
    return [requests, latency, *families.values()]


def _bucket_families(
    core: Any, buckets: Mapping[str, BucketStats], limit: int
) -> Iterable[Any]:
    groups = _grouped(buckets, lambda one: one.steps, limit)
    steps = core.CounterMetricFamily(
        "stfuse_bucket_steps", "Steps run", labels=["bucket"]
    )
    for label, group in groups.items():
        steps.add_metric([label], sum(one.steps for one in group))
    yield steps
    for field, name, text in _BUCKET_NUMBERS:
        family = core.GaugeMetricFamily(f"stfuse_{name}", text, labels=["bucket"])
        for label, group in groups.items():
            family.add_metric([label], _worst(getattr(one, field) for one in group))
        yield family


def _grouped(
    named: Mapping[str, Any], size_fn: Any, limit: int
) -> dict[str, Sequence[Any]]:
    """Return the largest by name, and the rest together."""
    order = sorted(named, key=lambda name: (-size_fn(named[name]), name))
    own = [name for name in order if name != _OTHER][:limit]
    is_own = set(own)
    rest = [named[name] for name in order if name not in is_own]
    groups: dict[str, Sequence[Any]] = {name: [named[name]] for name in own}
    return groups | ({_OTHER: rest} if rest else {})


def _worst(numbers: Iterable[float]) -> float:
    """Return the largest number, leaving out those that nothing was measured for."""
    return max((x for x in numbers if x == x), default=float("nan"))
