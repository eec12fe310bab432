"""What a lane's steps take, and who waits for them, says nothing of another lane."""

import math

import numpy as np
import pytest

from stfuse._scheduler import Scheduler
from stfuse._types import Bucket, Drain, Install, Join, Leave, Policy, Ready
from tests.test_scheduler import served, submit
from tests.test_shares import made


def with_straggler(slow_s, buckets, tenants, **options):
    """Return a scheduler with a lane of all, and one of a slow tenant's own."""
    scheduler = Scheduler(Policy.SPACE_TIME, **options)
    for name in (*tenants, "slow"):
        scheduler.handle(Join(name))
    scheduler.handle(Install("own", (1,), {"slow": (0,)}))
    scheduler.handle(Ready("own", Bucket((1,), 1), slow_s))
    scheduler.handle(Install("all", (32,), dict.fromkeys(tenants, (0,))))
    for (slots, rows), step_s in buckets.items():
        scheduler.handle(Ready("all", Bucket((slots,), rows), step_s))
    return scheduler


def test_a_straggler_in_its_own_lane_has_nobody_else_refused():
    fast = [f"x{i}" for i in range(31)]
    scheduler = with_straggler(0.02, {(32, 8): 0.001}, fast)
    submit(scheduler, 0, "slow")
    assert served(scheduler.decide(0.0)) == [("slow", (0,))]
    for i, name in enumerate(fast):
        submit(scheduler, 1 + i, name, deadline_s=0.1)
    for i in range(7):  # they fit in the same slot
        submit(scheduler, 100 + i, "x0", deadline_s=0.1)
    assert len(scheduler.decide(0.02).batch.chunks) == 31
    assert not scheduler.num_queued


def test_a_request_is_not_dropped_for_another_lanes_long_steps():
    scheduler = with_straggler(0.1, {(1, 1): 0.001}, "a")
    for request in range(2):
        submit(scheduler, request, "slow")
    assert served(scheduler.decide(0.0)) == [("slow", (0,))]
    submit(scheduler, 2, "a", now_s=0.1, deadline_s=0.15)  # the device is idle again
    decision = scheduler.decide(0.1)
    assert not decision.expired and served(decision) == [("a", (2,))]


def newcomers(num, **options):
    """Return a scheduler where some wait for a lane that is not built yet."""
    scheduler = with_straggler(9.0, {(1, 1): 0.001, (4, 1): 0.003}, "abcd", **options)
    for i in range(num):
        scheduler.handle(Join(f"new{i}"))
        submit(scheduler, i, f"new{i}", deadline_s=20.0)
    assert not served(scheduler.decide(0.0))
    return scheduler


def test_newcomers_have_nobody_dropped_or_refused_who_is_in_time():
    scheduler = newcomers(40)
    for i, name in enumerate("abcd"):
        submit(scheduler, 100 + i, name)
    assert len(served(scheduler.decide(0.0))) == 4
    submit(scheduler, 200, "a", now_s=5.0, deadline_s=5.0025)
    assert not (decision := scheduler.decide(5.0)).expired
    assert served(decision) == [("a", (200,))]
    submit(scheduler, 201, "a", now_s=19.99, deadline_s=20.002)  # after all of theirs
    assert served(scheduler.decide(19.995)) == [("a", (201,))]


def test_newcomers_keep_nobody_from_waiting_for_company():
    scheduler = newcomers(1, max_queue_delay_s=0.5)
    submit(scheduler, 100, "a")
    assert scheduler.decide(0.0).wait_until_s == 0.5
    submit(scheduler, 101, "new0", deadline_s=30.0)  # nothing can serve it
    assert scheduler.is_resting
    submit(scheduler, 102, "b")
    assert scheduler.is_resting
    scheduler.handle(Install("two", (1,), {"new0": (0,)}))
    scheduler.handle(Ready("two", Bucket((1,), 1), 0.001))
    assert served(scheduler.decide(0.1)) == [("new0", (0,))]


def test_who_is_held_back_has_nobody_dropped_who_has_a_claim():
    names = [f"o{i}" for i in range(62)]
    scheduler = made(["a", "b", *names], {1: 0.002, 16: 0.005, 64: 0.02})
    for request in range(200):
        submit(scheduler, request, "a")
    for i, name in enumerate(names):
        submit(scheduler, 300 + i, name)
    now_s = 0.0
    while (decision := scheduler.decide(now_s)).batch:
        now_s += decision.batch.predicted_s
    assert scheduler.queued("a")
    submit(scheduler, 999, "b", now_s=now_s, deadline_s=now_s + 0.004)
    decision = scheduler.decide(now_s)
    assert not decision.expired and ("b", (999,)) in served(decision)


def test_who_has_no_claim_has_nobody_refused_who_has():
    floods = [f"f{i}" for i in range(16)]
    scheduler = made(["a", *floods], {1: 0.01, 4: 0.012}, {"a": 16.0})
    submit(scheduler, 9998, "a")  # it is about
    for i in range(16 * 40):
        submit(scheduler, i, floods[i % 16], deadline_s=1.0)
    now_s = 0.0
    while now_s < 0.96:
        decision = scheduler.decide(now_s)
        step_s = decision.batch.predicted_s if decision.batch else 0.0
        now_s = now_s + step_s if step_s else min(decision.wait_until_s, 0.96)
    assert all(map(scheduler.queued, floods))
    submit(scheduler, 9999, "a", now_s=now_s, deadline_s=1.001)
    assert ("a", (9999,)) in served(scheduler.decide(now_s))


def test_after_a_quiet_time_nobody_is_refused_for_it():
    times = {slots: 1e-3 for slots in (1, 2, 4, 8)}
    scheduler, now_s = made("ab", times, max_batch_size=1), 0.0
    for request in range(40):
        submit(scheduler, request, "b", now_s=now_s)
        scheduler.decide(now_s)
        now_s += 0.02  # each alone: the device is idle most of the time
    for request in range(80):
        submit(scheduler, 100 + request, "a", now_s=now_s, deadline_s=now_s + 0.02)
    for _ in range(20):
        scheduler.decide(now_s)
        now_s += 1e-3
    assert not scheduler.num_queued


@pytest.mark.parametrize("num", [6, 40])
def test_floods_further_down_the_order_have_nobody_dropped(num):
    floods = [f"f{i}" for i in range(num)]
    weights = {"a": 1e6, "b": 1e6}
    scheduler = made(["a", "b", *floods], {1: 0.002, 4: 0.012}, weights)
    now_s, request = 0.0, 0
    for name in floods:
        for _ in range(30):
            request += 1
            submit(scheduler, request, name)
    for _ in range(62):
        if not scheduler.queued("a"):
            request += 1
            submit(scheduler, request, "a", now_s=now_s)
        batch = scheduler.decide(now_s).batch
        now_s += batch.predicted_s if batch else 0.002
    until_s = now_s + 0.98 * scheduler._lanes["all"].step_s
    submit(scheduler, 9999, "b", now_s=now_s, deadline_s=until_s)
    assert 9999 not in scheduler.decide(now_s).expired


def test_lanes_that_come_and_go_leave_no_count_behind():
    rng = np.random.default_rng(0)
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    names, now_s, request = [f"t{i}" for i in range(6)], 0.0, 0
    for name in names:
        scheduler.handle(Join(name))
    for _ in range(400):
        now_s += 0.01
        lane, some = f"l{rng.integers(3)}", rng.permutation(names)[: rng.integers(4)]
        match rng.integers(4):
            case 0:
                members = dict.fromkeys(some.tolist(), (0,))
                scheduler.handle(Install(lane, (4,) if len(some) else (), members))
            case 1:
                scheduler.handle(Ready(lane, Bucket((2,), 1), 0.005))
            case 2:
                for name in some:
                    until_s = now_s + rng.choice([0.02, math.inf])
                    request += 1
                    submit(scheduler, request, name, now_s, deadline_s=until_s)
            case _:
                scheduler.decide(now_s)
        queues = scheduler._queues
        ready = [t for t in queues.waiting.values() if not t.is_parked]
        assert queues.num_tenants == len(ready)
        assert queues.num_ready == sum(len(t.queue) for t in ready)
        heads = {of: line.heads for of, line in queues.lines._lines.items()}
        assert heads == {
            of: sorted(
                t.queue[0].deadline_s
                for t in ready
                if t.lane == of and t.queue[0].deadline_s < math.inf
            )
            for of in {t.lane for t in ready}
        }
    scheduler.handle(Drain())
    for name in names:
        scheduler.handle(Leave(name))
    scheduler.decide(math.inf)
