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
