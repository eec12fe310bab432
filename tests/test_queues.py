"""The order in which tenants are served: by weight, by deadline, and for how long."""

import contextlib

import numpy as np
import pytest

import stfuse
from stfuse._scheduler import Scheduler
from stfuse._types import Bucket, Cancel, Install, Join, Leave, Policy, Ready, Submit
from stfuse.testing import Arrivals, poisson, simulate

STEP_S = 1e-3


def one_slot(weights, slots=(1,)):
    """Return a scheduler of tenants 0, 1, 2 ... with steps of some slots."""
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    names = [str(i) for i in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        scheduler.handle(Join(name, weight))
    members = dict.fromkeys(names, (0,))
    scheduler.handle(Install("all", (len(names),), members))
    for num in slots:
        scheduler.handle(Ready("all", Bucket((num,), 1), STEP_S))
    return scheduler


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("weights", [(1, 3), (0.01, 1, 3), (1, 2, 4, 8, 16)], ids=str)
def test_who_always_waits_is_served_by_weight_whatever_weights_sum_to(weights, scale):
    scheduler, now_s = one_slot([scale * w for w in weights]), 0.0
    request, served = 0, np.zeros(len(weights))
    for i in range(len(weights)):
        for _ in range(3):
            scheduler.handle(Submit(request, str(i), 1, now_s))
            request += 1
    for _ in range(4000):
        (chunk,) = scheduler.decide(now_s).batch.chunks
        served[int(chunk.tenant)] += 1
        now_s += STEP_S
        scheduler.handle(Submit(request, chunk.tenant, 1, now_s))
        request += 1
    expected = 4000 * np.array(weights) / sum(weights)
    np.testing.assert_allclose(served, expected, atol=8)


@pytest.mark.parametrize(("num", "slots"), [(5, (1,)), (5, (1, 2)), (20, (1, 2))])
def test_deadlines_give_nobody_more_than_its_share_of_what_all_wait_for(num, slots):
    scheduler, now_s, request = one_slot([1.0] * num, slots), 0.0, 0
    served, wanted = np.zeros(num), list(range(num)) * 4
    while served.sum() < 3000:
        for i in wanted:  # the first one's have to start within 50 steps
            deadline_s = None if i else now_s + 50 * STEP_S
            scheduler.handle(Submit(request, str(i), 1, now_s, deadline_s))
            request += 1
        decision = scheduler.decide(now_s)
        wanted = [0] * len(decision.expired)
        if decision.batch is not None:
            wanted += [int(chunk.tenant) for chunk in decision.batch.chunks]
            np.add.at(served, wanted[len(decision.expired) :], 1)
        now_s += STEP_S
    np.testing.assert_allclose(served / served.sum(), 1 / num, atol=0.15 / num)


@pytest.mark.parametrize("own_share", [0.1, 0.5])
@pytest.mark.parametrize("is_loop", [False, True])
def test_deadlines_do_not_take_from_who_asks_for_less(seed, own_share, is_loop):
    # The other has 50 requests waiting, or sends one as soon as it has an answer.
    due_s = np.cumsum(np.random.default_rng(seed).exponential(2e-3 / own_share, 1000))
    scheduler, now_s, own, other, waiting = one_slot([1.0] * 2), 0.0, 0, 10_000, 0
    waited_s = []
    while own < len(due_s) or len(waited_s) < len(due_s):
        while own < len(due_s) and due_s[own] <= now_s:
            scheduler.handle(Submit(own, "0", 1, now_s, due_s[own] + 60 * STEP_S))
            own += 1
        while waiting < (1 if is_loop else 50):
            scheduler.handle(Submit(other, "1", 1, now_s, now_s + 55 * STEP_S))
            other, waiting = other + 1, waiting + 1
        decision = scheduler.decide(now_s)
        assert all(request >= 10_000 for request in decision.expired)
        (chunk,) = decision.batch.chunks
        now_s += STEP_S
        waited_s += [now_s - due_s[i] for i in chunk.requests if i < 10_000]
        waiting -= len(decision.expired) + (chunk.tenant == "1")
    assert np.quantile(waited_s, 0.99) <= 16 * STEP_S


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_deadlines_that_can_be_met_are_met_beside_others_that_have_time(seed, scale):
    # Half of the tenants have to start within 20 steps, the others within 10,000.
    num, load = 20, 0.9
    arrivals = poisson(load / STEP_S, 8000, num, seed=seed)
    deadline_s = np.where(arrivals.tenants % 2, 20 * STEP_S, 10.0)
    scheduler, now_s, i = one_slot([scale] * num), 0.0, 0
    missed = 0
    while i < len(arrivals.due_s) or scheduler.num_queued:
        while i < len(arrivals.due_s) and arrivals.due_s[i] <= now_s:
            due_s, tenant = float(arrivals.due_s[i]), str(arrivals.tenants[i])
            scheduler.handle(Submit(i, tenant, 1, now_s, due_s + float(deadline_s[i])))
            i += 1
        decision = scheduler.decide(now_s)
        missed += len(decision.expired)
        if decision.batch is not None:
            now_s += STEP_S
        elif i < len(arrivals.due_s):
            now_s = max(now_s, float(arrivals.due_s[i]))
    assert missed <= 0.002 * len(arrivals.due_s)


@pytest.mark.parametrize("load", [0.9, 1.2])
@pytest.mark.parametrize(("weight", "least"), [(100.0, 0.8), (10.0, 0.18)])
def test_bursts_of_light_tenants_leave_a_heavy_one_its_share(seed, load, weight, least):
    # The heavy one always waits, without deadlines; half of the others' are short.
    arrivals = poisson(load / STEP_S, int(5 * load / STEP_S), 20, seed=seed)
    scheduler, now_s, i, waiting = one_slot([1.0] * 20 + [weight]), 0.0, 0, 0
    served = np.zeros(21)
    while i < len(arrivals.due_s):
        while i < len(arrivals.due_s) and arrivals.due_s[i] <= now_s:
            deadline_s = now_s + (0.02 if arrivals.tenants[i] % 2 else 10.0)
            with contextlib.suppress(stfuse.DeadlineError):
                tenant = str(arrivals.tenants[i])
                scheduler.handle(Submit(i, tenant, 1, now_s, deadline_s))
            i += 1
        while waiting < 3:
            scheduler.handle(
                Submit(1_000_000 + int(served[20]) + waiting, "20", 1, now_s)
            )
            waiting += 1
        (chunk,) = scheduler.decide(now_s).batch.chunks
        now_s += STEP_S
        served[int(chunk.tenant)] += 1
        waiting -= chunk.tenant == "20"
    assert served[20] >= least * served.sum()


def test_a_light_tenant_waits_for_its_share_not_for_a_round_of_all():
    due_s = np.arange(2000) * STEP_S / 2
    run = simulate(
        Arrivals(due_s, np.arange(2000) % 2), {(1, 1): STEP_S}, weights=[1.0, 9.0]
    )
    done = np.isfinite(run.latency_s)
    first = done & (run.latency_s + due_s < 0.5)
    served = np.bincount(run.tenants[first], minlength=2)
    assert served[0] == pytest.approx(50, abs=8) and served[1] >= 440


def test_what_is_remembered_of_those_who_went_is_bounded():
    scheduler = one_slot([1.0] * 4)
    scheduler.handle(Join("parked", 1.0))
    scheduler.handle(Submit(0, "parked", 1, 0.0, 3600.0))  # no lane has it
    for i in range(1, 5000):
        scheduler.handle(Submit(i, str(i % 4), 1, 0.0, 7200.0))
        assert scheduler.decide(0.0).batch is not None
    for i in range(5000, 6000):
        scheduler.handle(Join(f"t{i}", 1.0))
        scheduler.handle(Submit(i, f"t{i}", 1, 0.0))
        scheduler.decide(0.0)
        scheduler.handle(Cancel(i))
        scheduler.handle(Leave(f"t{i}"))
    queues = scheduler._queues
    assert len(queues) == 1 and len(queues._expiring) < 100
    assert sum(map(len, queues._parked.values())) == 1


def backlogged(weights, step_s, capacity, seconds, deadline_s=None):
    """Serve tenants that always wait; return each one's slots, and who had a slot."""
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    names = [str(i) for i in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        scheduler.handle(Join(name, weight))
    scheduler.handle(Install("all", (capacity,), dict.fromkeys(names, (0,))))
    for (slots, is_open), each_s in step_s.items():
        scheduler.handle(Ready("all", Bucket((slots,), 1, is_open), each_s))
    now_s, request, served, steps = 0.0, 0, np.zeros(len(weights)), []
    while now_s < seconds:
        for name in names:
            for _ in range(40 - len(scheduler.queued(name))):
                request += 1
                is_urgent = deadline_s is not None and name == names[-1]
                until_s = now_s + deadline_s if is_urgent else None
                scheduler.handle(Submit(request, name, 1, now_s, until_s))
        batch = scheduler.decide(now_s).batch
        steps.append([int(chunk.tenant) for chunk in batch.chunks])
        now_s += batch.predicted_s
        if now_s > seconds / 4:
            np.add.at(served, steps[-1], 1)
    return served / served.sum(), steps


@pytest.mark.parametrize(
    ("weights", "slots"),
    [
        ([16] + [1] * 16, 4),
        ([1] * 4 + [4], 4),
        ([8] + [1] * 8, 8),
        ([1, 2, 4], 4),
        ([1e-6] * 20 + [1e-5] * 4, 8),
        ([1] * 8, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_dense", [False, True])
def test_slots_of_steps_that_all_wait_for_go_by_weight(weights, slots, is_dense):
    step_s = {
        (2**i, False): 1e-3 * (1 + 0.05 * 2**i) for i in range(4) if 2**i <= slots
    }
    if (
        is_dense := is_dense and len(weights) <= slots
    ):  # each has its own in the largest
        step_s[slots, True] = 1.05 * step_s[slots, False]
    capacity = slots if is_dense else 64
    got, steps = backlogged(weights, step_s, capacity, 2.0)
    expected = np.array(weights) / sum(weights)
    np.testing.assert_allclose(got, expected, rtol=0.05, atol=2e-3)
    assert np.mean([*map(len, steps)]) == pytest.approx(slots, rel=0.01)


def test_who_asks_for_less_than_its_share_waits_for_no_heavier_one():
    due_s = np.sort(np.concatenate([np.zeros(4000), 0.02 * np.arange(40)]))
    tenants = np.where(due_s > 0, 2, np.arange(len(due_s)) % 2)
    trace, table = Arrivals(due_s, tenants), {(1, 1): 1e-3, (4, 1): 1e-3}
    run = simulate(trace, table, weights=[8, 1, 1], max_queue_size=10_000)
    assert run.quantile_s(1.0, [2]) <= 2e-3
    late = simulate(trace, table, weights=[8, 1, 1], deadline_s=3e-3)
    assert late.quantile_s(1.0, [2]) <= 2e-3


def test_a_flood_of_deadlines_has_what_its_weight_says():
    step_s = {(k, False): 1e-3 for k in (1, 2, 4)}
    got, _ = backlogged([8, 1, 1], step_s, 64, 2.0, deadline_s=0.5)
    np.testing.assert_allclose(got, [0.8, 0.1, 0.1], atol=0.02)


def test_what_a_lane_had_no_room_for_is_not_saved_up():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    weights = {"heavy": 50.0, "a": 1.0, "b": 1.0, "c": 1.0}
    for name, weight in weights.items():
        scheduler.handle(Join(name, weight))
    scheduler.handle(Install("all", (4,), dict.fromkeys(weights, (0,))))
    scheduler.handle(Ready("all", Bucket((4,), 1), 0.01))  # each has its own slot
    now_s, request = 0.0, 0
    seen = []
    for step in range(1200):
        for name in weights:
            for _ in range(8 - len(scheduler.queued(name))):
                request += 1
                scheduler.handle(Submit(request, name, 1, now_s))
        if step == 1000:
            scheduler.handle(Ready("all", Bucket((4,), 1, True), 0.01))
        batch = scheduler.decide(now_s).batch
        now_s += 0.01
        seen.append({chunk.tenant for chunk in batch.chunks})
    assert all(len(each) == 4 for each in seen[:1000])
    least = min(sum("a" in each for each in seen[i : i + 80]) for i in (1000, 1100))
    assert least >= 1  # 53 slots are a round of all


def test_slots_of_one_program_that_a_heavier_one_cannot_use_are_filled():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    for name, weight in (("heavy", 100.0), ("light", 1.0)):
        scheduler.handle(Join(name, weight))
    members = {"heavy": (0,), "light": (1,)}
    scheduler.handle(Install("all", (9, 9), members))
    scheduler.handle(Ready("all", Bucket((4, 4), 1, True), 0.01))
    for request in range(16):
        scheduler.handle(Submit(request, ("heavy", "light")[request % 2], 1, 0.0))
    served = [chunk.tenant for chunk in scheduler.decide(0.0).batch.chunks]
    assert sorted(served) == ["heavy"] * 4 + ["light"] * 4


def lane_of(weights, times, capacities=(64,), species=None, **options):
    """Return a scheduler with a lane of all; times by slots and rows."""
    scheduler = Scheduler(Policy.SPACE_TIME, **options)
    for name, weight in weights.items():
        scheduler.handle(Join(name, weight))
    members = {name: (species or {}).get(name, (0,)) for name in weights}
    scheduler.handle(Install("all", capacities, members))
    for (slots, rows, *is_open), step_s in times.items():
        scheduler.handle(Ready("all", Bucket(slots, rows, *is_open), step_s))
    return scheduler


def rows_per_s(scheduler, names, steps=400):
    """Keep eight requests of one row of each waiting; return rows/s, and of whom."""
    now_s, request, rows = 0.0, 0, dict.fromkeys(names, 0)
    for _ in range(steps):
        for name in names:
            for _ in range(8 - len(scheduler.queued(name))):
                request += 1
                scheduler.handle(Submit(request, name, 1, now_s))
        batch = scheduler.decide(now_s).batch
        now_s += batch.predicted_s
        for chunk in batch.chunks:
            rows[chunk.tenant] += chunk.rows
    return sum(rows.values()) / now_s, rows


def test_who_has_deadlines_has_slots_by_its_weight_too():
    times = {((k,), 1): 1e-3 * (1 + 0.05 * k) for k in (1, 2, 4, 8)}
    scheduler = lane_of({"u": 10.0, "b": 1.0}, times, max_batch_size=1)
    for request in range(116):
        is_urgent = request >= 100
        until_s = 0.0045 if is_urgent else None
        scheduler.handle(Submit(request, "ub"[not is_urgent], 1, 0.0, until_s))
    now_s, served = 0.0, []
    while now_s < 0.02 and (decision := scheduler.decide(now_s)).batch:
        assert not decision.expired
        served += [n for c in decision.batch.chunks for n in c.requests]
        now_s += decision.batch.predicted_s
    assert set(range(100, 116)) <= set(served)


@pytest.mark.parametrize("weight", [1.0, 4.0, 100.0])
def test_weights_make_no_step_emptier_than_it_need_be(weight):
    names = ["h", *(f"l{i}" for i in range(7))]
    weights = dict.fromkeys(names, 1.0) | {"h": weight}
    times = {((k,), 8): 1e-3 * (1 + 0.05 * k) for k in (1, 2, 4, 8)}
    of_rows, _ = rows_per_s(lane_of(weights, times, max_batch_size=8), names)
    assert of_rows == pytest.approx(64 / 1.4e-3, rel=0.02)  # eight rows share a slot

    species = {name: (int(name != "h"),) for name in names}
    times = {((8, 0), 1): 1e-3, ((0, 8), 1): 1e-3, ((8, 8), 1): 1.1e-3}
    dense = lane_of(weights, times, (8, 8), species, max_batch_size=1)
    of_rows, rows = rows_per_s(dense, names)  # each has its own slot
    assert of_rows == pytest.approx(8 / 1.1e-3, rel=0.02)
    assert min(rows.values()) == 400


def test_who_had_what_nobody_wanted_is_not_made_to_pay_for_it_for_long():
    times = {((k,), 1): 1e-3 * (1 + 0.05 * k) for k in (1, 2, 4, 8)}
    scheduler = lane_of({"a": 1.0, "b": 2.0, "c": 2.0}, times, max_batch_size=1)
    now_s, request, got = 0.0, 0, np.zeros(3)
    for step in range(3000):
        for name, num in (("a", 20), ("b", 1), ("c", 20 if step >= 2000 else 0)):
            for _ in range(num - len(scheduler.queued(name))):
                request += 1
                scheduler.handle(Submit(request, name, 1, now_s))
        batch = scheduler.decide(now_s).batch
        now_s += batch.predicted_s
        for chunk in batch.chunks if step >= 2200 else ():
            got["abc".index(chunk.tenant)] += 1
    assert got[0] / got.sum() > 0.2  # a third of what is left of b's one slot of eight


def test_a_parked_tenant_is_tried_again_when_another_request_comes_first():
    scheduler = lane_of({"a": 1.0}, {((1,), 2): 0.001}, max_batch_size=8)
    scheduler.handle(Submit(0, "a", 8, 0.0))  # no bucket has so many rows
    assert scheduler.decide(0.0).batch is None
    scheduler.handle(Submit(1, "a", 1, 0.0))
    assert scheduler.decide(0.0).batch is None
    scheduler.handle(Cancel(0))
    assert scheduler.decide(0.0).batch.chunks[0].requests == (1,)
    scheduler.handle(Submit(2, "a", 8, 0.0))
    assert scheduler.decide(0.0).batch is None
    scheduler.handle(Submit(3, "a", 1, 0.0, 1.0))  # its deadline puts it first
    assert scheduler.decide(0.0).batch.chunks[0].requests == (3,)
    assert scheduler.num_queued == 1
