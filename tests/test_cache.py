"""Buckets cover all work, a signature is compiled once, a median is remembered."""

import threading

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stfuse import _cache
from stfuse._options import rows_of
from stfuse._types import Bucket


@given(st.integers(1, 10**6))
def test_the_next_power_of_two_is_the_least_that_suffices(n):
    power = _cache.next_power_of_two(n)
    assert power & (power - 1) == 0 and power / 2 < n <= power


@pytest.mark.parametrize(
    ("limit", "powers"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_powers_of_two_end_with_the_limit_itself(limit, powers):
    assert _cache.powers_of_two(limit) == powers


LANES = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 64),
    st.integers(1, 16),
)


@given(LANES)
def test_buckets_respect_their_bounds(lane):
    capacities, max_slots, max_rows = lane
    found = _cache.buckets(capacities, max_slots, rows_of(None, max_rows))
    assert len(set(found)) == len(found)
    for bucket in found:
        assert len(bucket.slots) == len(capacities)
        assert 1 <= bucket.rows <= max_rows
        assert 1 <= sum(bucket.slots) <= max_slots
        for k, capacity in zip(bucket.slots, capacities, strict=True):
            assert 0 <= k <= capacity


@given(LANES)
def test_a_lone_request_of_any_species_pays_for_nobody_else(lane):
    capacities, max_slots, max_rows = lane
    found = _cache.buckets(capacities, max_slots, rows_of(None, max_rows))
    for s in range(len(capacities)):
        slots = tuple(int(i == s) for i in range(len(capacities)))
        assert {Bucket(slots, 1), Bucket(slots, max_rows)} <= set(found)


@given(LANES)
def test_the_first_bucket_covers_the_most(lane):
    capacities, max_slots, max_rows = lane
    first, *rest = _cache.buckets(capacities, max_slots, rows_of(None, max_rows))
    assert first.rows == max_rows
    covered = np.count_nonzero(first.slots), sum(first.slots)
    assert all(covered >= (np.count_nonzero(b.slots), sum(b.slots)) for b in rest)
    if sum(capacities) <= max_slots:
        assert first.slots == tuple(capacities)


@given(LANES, st.booleans())
def test_a_lane_that_begins_to_serve_can_serve_all(lane, each):
    capacities, max_slots, max_rows = lane
    found = _cache.buckets(capacities, max_slots, rows_of(None, max_rows))
    first = _cache.covering(found, each=each)
    assert set(first) <= set(found) and all(b.rows == max_rows for b in first)
    slots = np.array([b.slots for b in first])
    assert slots.any(0).all()
    if each:
        assert (slots.sum(1) == 1).all() and len(first) == len(capacities)
    elif len(capacities) <= max_slots:
        assert len(first) == 1


@given(LANES)
def test_a_step_of_many_slots_that_serves_all_can_be_open(lane):
    capacities, max_slots, max_rows = lane
    found = _cache.buckets(capacities, max_slots, rows_of(None, max_rows))
    opened = [bucket for bucket in found if bucket.is_open]
    assert not found[0].is_open
    if len(capacities) == 1 and 8 <= sum(capacities) <= max_slots:
        assert {bucket.slots for bucket in opened} == {tuple(capacities)}
        rows = [bucket.rows for bucket in opened]
        assert rows == [*_cache.powers_of_two(max_rows)]
    else:
        assert not opened


def test_a_bucket_prints_its_slots_and_rows():
    assert str(Bucket((16, 8), 4)) == "16+8x4"
    assert str(Bucket((16, 8), 4, is_open=True)) == "open 16+8x4"


def test_a_signature_is_built_once():
    cache, built = _cache.StepCache(), []
    for signature in ("a", "b", "a", "b"):
        step = cache.get(signature, lambda s=signature: built.append(s) or s.upper())
        assert step == signature.upper()
    assert built == ["a", "b"] and cache.num_compiles == 2


def test_callers_that_come_together_build_once_and_get_the_same():
    cache, built, found = _cache.StepCache(), [], []
    started, release = threading.Event(), threading.Event()

    def build():
        built.append(1)
        started.set()
        assert release.wait(10)
        return object()

    def call():
        found.append(cache.get("a", build))

    threads = [threading.Thread(target=call) for _ in range(4)]
    threads[0].start()
    assert started.wait(10)
    for thread in threads[1:]:
        thread.start()
    release.set()
    for thread in threads:
        thread.join(10)
    assert built == [1]
    assert len(found) == 4 and len(set(map(id, found))) == 1


def test_a_build_that_fails_is_tried_anew():
    cache = _cache.StepCache()
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 // 0)
    assert cache.get("a", lambda: "built") == "built"
    assert cache.num_compiles == 1


def test_the_least_recently_used_entry_leaves_first():
    cache, built = _cache.StepCache(max_entries=2), []
    for signature in ("a", "b", "a", "c", "a", "b"):
        cache.get(signature, lambda s=signature: built.append(s))
    assert built == ["a", "b", "c", "b"]


def test_settings_that_change_a_program_change_the_signature():
    plain = _cache.config_key()
    with jax.default_matmul_precision("bfloat16"):
        assert _cache.config_key() != plain
    with jax.enable_x64(True):
        assert _cache.config_key() != plain
    assert _cache.config_key() == plain


TIMES = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40)


@given(TIMES, st.integers(1, 9))
def test_a_prediction_is_the_median_of_the_last_few_measurements(times_s, window):
    table = _cache.CostTable(window)
    predictions = [table.record(("lane", "bucket"), t)[0] for t in times_s]
    for i, predicted_s in enumerate(predictions):
        seen = times_s[max(0, i + 1 - window) : i + 1]
        assert predicted_s in seen
        assert 2 * sum(t <= predicted_s for t in seen) >= len(seen)
        assert 2 * sum(t >= predicted_s for t in seen) >= len(seen)


def test_a_stall_is_forgotten():
    table = _cache.CostTable()
    assert [table.record(("a",), t) for t in (0.1, 9.0, 0.1)][-1] == (0.1, 9.0, 0.0)


def test_a_bucket_that_rests_forgets_its_slowest_measurements_until_one_is_left():
    table = _cache.CostTable(patience=4)
    slow, fast, other = ("a", "slow"), ("a", "fast"), ("b", "fast")
    for step_s in (1.0, 9.0, 9.0, 9.0):
        table.record(slow, step_s)
        assert table.rested("a") == {}
        table.record(other, step_s)
    found = []
    for _ in range(16):
        table.record(fast, 2.0)
        found.append(table.rested("a"))
    kept = [each for each in found if each]
    assert kept == [{slow: (1.0, 9.0, 0.0)}, {slow: (1.0, 1.0, 0.0)}]
    assert found[3] and found[11]  # twice as long the second time
    assert table.record(other, 9.0) == (9.0, 9.0, 0.0)
    assert table.record(slow, 1.0) == (1.0, 1.0, 0.0)


def test_a_bucket_that_a_slow_host_made_look_slow_is_tried_again():
    table = _cache.CostTable(patience=4)
    slow, other = ("a", "slow"), ("a", "other")
    for host_s in (0.2, *[0.5] * 15):
        table.record(slow, 0.001, host_s)
    kept = []
    for _ in range(4 * 64):
        table.record(other, 0.01, 0.01)
        kept += table.rested("a").values()
    assert kept[-1] == (0.001, 0.001, 0.2)


def test_what_steps_take_the_host_is_kept_apart():
    table = _cache.CostTable(window=4)
    for host_s in (9.0, 9.0, 9.0, 0.2, 0.2, 0.3):
        found = table.record(("a", 1), 0.1, host_s)
    assert found == (0.1, 0.1, 0.2)  # of the last four


def test_measurements_of_one_bucket_say_nothing_of_another_and_can_be_forgotten():
    table = _cache.CostTable()
    table.record(("a", 1), 5.0)
    assert table.record(("b", 1), 1.0)[0] == 1.0
    table.forget("a")
    assert table.record(("a", 1), 1.0)[0] == 1.0
    table.record(("b", 1), 3.0)
    assert table.record(("b", 1), 2.0)[0] == 2.0
