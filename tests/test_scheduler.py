"""The scheduler on a virtual clock: its rules, by hand."""

import math

import numpy as np
import pytest

from stfuse._errors import ClosedError, DeadlineError, QueueFullError
from stfuse._queues import Queues, Tenant
from stfuse._scheduler import Scheduler
from stfuse._types import (
    Bucket,
    Install,
    Join,
    Leave,
    Policy,
    Ready,
    Submit,
)
from stfuse.testing import Arrivals, simulate


def one_lane(policy=Policy.SPACE_TIME, tenants="abc", capacity=4, rows=2, **options):
    """Return a scheduler with one species of tenants, all its buckets ready."""
    scheduler = Scheduler(policy, max_batch_size=rows, **options)
    for name in tenants:
        scheduler.handle(Join(name))
    if policy is Policy.SPACE_TIME:
        lanes = {"all": tuple(tenants)}
    else:
        lanes, capacity = {name: (name,) for name in tenants}, 1
    for lane, members in lanes.items():
        scheduler.handle(Install(lane, (capacity,), dict.fromkeys(members, (0,))))
        slots = 1
        while slots <= capacity:
            for b in {1, rows}:
                scheduler.handle(Ready(lane, Bucket((slots,), b), 0.01))
            slots *= 2
    return scheduler


def submit(scheduler, request, tenant, now_s=0.0, rows=1, deadline_s=None):
    scheduler.handle(Submit(request, tenant, rows, now_s, deadline_s))


def served(decision):
    """Return who runs and what, as the decision orders it."""
    if decision.batch is None:
        return []
    return [(chunk.tenant, chunk.requests) for chunk in decision.batch.chunks]


def test_space_time_serves_every_tenant_in_one_step():
    scheduler = one_lane()
    for request, tenant in enumerate("abc"):
        submit(scheduler, request, tenant)
    decision = scheduler.decide(0.0)
    assert served(decision) == [("a", (0,)), ("b", (1,)), ("c", (2,))]
    assert decision.batch.bucket == Bucket((4,), 1)
    assert scheduler.num_queued == 0


def test_exclusive_batches_one_tenants_requests():
    scheduler = one_lane(Policy.EXCLUSIVE)
    for request, tenant in enumerate("aab"):
        submit(scheduler, request, tenant)
    assert served(scheduler.decide(0.0)) == [("a", (0, 1))]
    assert served(scheduler.decide(0.0)) == [("b", (2,))]


def test_time_serves_one_request_a_step_round_robin():
    scheduler = one_lane(Policy.TIME)
    for request, tenant in enumerate("aaabbc"):
        submit(scheduler, request, tenant)
    order = [served(scheduler.decide(0.0)) for _ in range(6)]
    assert [step[0][0] for step in order] == ["a", "b", "c", "a", "b", "a"]
    assert all(len(step) == 1 and len(step[0][1]) == 1 for step in order)


def test_a_heavy_tenant_fills_the_slots_that_others_leave():
    scheduler = one_lane()
    for request in range(4):
        submit(scheduler, request, "a")
    submit(scheduler, 9, "b")
    scheduler.handle(Ready("all", Bucket((2,), 2), 0.001))
    assert served(scheduler.decide(0.0)) == [("a", (0, 1)), ("b", (9,))]
    assert served(scheduler.decide(0.0)) == [("a", (2, 3))]
    for request in range(10, 14):
        submit(scheduler, request, "a")
    assert served(scheduler.decide(0.0)) == [("a", (10, 11)), ("a", (12, 13))]


def test_where_all_slots_run_a_tenant_has_its_own_only():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    scheduler.handle(Join("a"))
    scheduler.handle(Install("all", (2,), {"a": (0,)}))
    scheduler.handle(Ready("all", Bucket((2,), 1), 0.01))
    submit(scheduler, 0, "a")
    submit(scheduler, 1, "a")
    assert served(scheduler.decide(0.0)) == [("a", (0,))]


def test_those_who_wait_for_more_have_more_of_an_open_step():
    scheduler = one_lane(rows=1)
    scheduler.handle(Ready("all", Bucket((4,), 1, is_open=True), 0.011))
    for request, tenant in enumerate("aaabc"):
        submit(scheduler, request, tenant)
    decision = scheduler.decide(0.0)
    assert decision.batch.bucket == Bucket((4,), 1, is_open=True)
    assert served(decision) == [("a", (0,)), ("b", (3,)), ("c", (4,)), ("a", (1,))]
    # Three have a slot each of the other one: it is faster, and as good. First come,
    # first served: nobody had more than half a step more than others.
    for request, tenant in enumerate("bc", 5):
        submit(scheduler, request, tenant)
    decision = scheduler.decide(0.0)
    assert decision.batch.bucket == Bucket((4,), 1)
    assert served(decision) == [("a", (2,)), ("b", (5,)), ("c", (6,))]


def test_the_earliest_deadline_runs_first_when_not_all_fit():
    scheduler = one_lane(capacity=1, rows=1)
    submit(scheduler, 0, "a", deadline_s=3.0)
    submit(scheduler, 1, "b", deadline_s=1.0)
    submit(scheduler, 2, "c", deadline_s=2.0)
    order = [served(scheduler.decide(0.0))[0][0] for _ in range(3)]
    assert order == ["b", "c", "a"]


def test_a_tenants_own_requests_run_earliest_deadline_first():
    scheduler = one_lane(capacity=1, rows=1)
    submit(scheduler, 0, "a")
    submit(scheduler, 1, "a", deadline_s=2.0)
    submit(scheduler, 2, "a", deadline_s=1.0)
    assert scheduler.queued("a") == (2, 1, 0)


def test_expired_requests_never_start():
    scheduler = one_lane()
    submit(scheduler, 0, "a", deadline_s=1.0)
    submit(scheduler, 1, "b", deadline_s=2.0)
    decision = scheduler.decide(1.0)
    assert decision.expired == (0,)
    assert served(decision) == [("b", (1,))]


def test_it_says_when_the_next_deadline_passes_if_nothing_can_run():
    scheduler = Scheduler(Policy.SPACE_TIME)
    scheduler.handle(Join("a"))
    submit(scheduler, 0, "a", deadline_s=7.0)
    assert scheduler.decide(0.0).wait_until_s == 7.0
    submit(scheduler, 1, "a")
    assert scheduler.decide(8.0).expired == (0,)
    assert scheduler.decide(8.0).wait_until_s is None


def test_deadlines_cannot_starve_tenants_without_them():
    scheduler = one_lane(capacity=1, rows=1)
    submit(scheduler, 0, "c")
    for request in range(1, 20):
        submit(scheduler, request, "ab"[request % 2], deadline_s=100.0)
    order = [served(scheduler.decide(0.0))[0][0] for _ in range(4)]
    assert "c" in order


def test_service_is_shared_by_weight():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, max_queue_size=1000)
    for name, weight in (("light", 1.0), ("heavy", 3.0)):
        scheduler.handle(Join(name, weight))
    scheduler.handle(Install("all", (2,), {"light": (0,), "heavy": (0,)}))
    scheduler.handle(Ready("all", Bucket((1,), 1), 0.01))
    for request in range(400):
        submit(scheduler, request, "light" if request % 2 else "heavy")
    first = [served(scheduler.decide(0.0))[0][0] for _ in range(200)]
    assert first.count("heavy") == pytest.approx(150, abs=3)


def test_idling_earns_no_credit():
    scheduler = one_lane(tenants="ab", capacity=1, rows=1, max_queue_size=1000)
    for request in range(100):
        submit(scheduler, request, "a")
    for _ in range(50):
        scheduler.decide(0.0)
    for request in range(100, 200):
        submit(scheduler, request, "b")
    order = [served(scheduler.decide(0.0))[0][0] for _ in range(20)]
    assert order.count("a") == pytest.approx(10, abs=2)


def test_whoever_comes_back_is_not_ahead_of_all_who_wait():
    queues = Queues(Policy.SPACE_TIME, lambda tenant: None)
    names = ("little", "some", "much", "back")
    little, some, much, back = tenants = [Tenant(name, 1.0) for name in names]
    for tenant, service_s in zip(tenants, (1.0, 2.0, 9.0, 0.0), strict=True):
        tenant.service_s = service_s
    queues.charge([little, much, some], [0.1, 0.1, 0.1])
    queues.add(back, Submit(0, "back", 1, 0.0, None))
    assert back.service_s == 2.0  # as most who were served; not as the least of them
    assert [t.service_s for t in (little, some, much)] == [1.1, 2.1, 9.1]


def test_whoever_has_most_slots_of_a_step_does_not_set_the_level():
    queues = Queues(Policy.SPACE_TIME, lambda tenant: None)
    little, some, much = tenants = [Tenant(name, 1.0) for name in "lsm"]
    for tenant, service_s in zip(tenants, (1.0, 2.0, 9.0), strict=True):
        tenant.service_s = service_s
    queues.charge([much, little, some, much, much], [0.1] * 5)
    back = Tenant("back", 1.0)
    queues.add(back, Submit(0, "back", 1, 0.0, None))
    assert back.service_s == 2.0


def test_those_of_about_the_same_service_run_in_order_of_arrival():
    queues = Queues(Policy.SPACE_TIME, lambda tenant: None)
    level, early, ahead = tenants = [Tenant(name, 1.0) for name in "lea"]
    for tenant, service_s in zip(tenants, (1.0, 1.0, 1.5), strict=True):
        tenant.service_s = service_s
    queues.charge([level, early], [0.6, 0.4])  # 0.5 is about the same, 0.4 too
    early.service_s, level.service_s = 1.5, 1.1
    for request, tenant in enumerate((ahead, early, level)):
        queues.add(tenant, Submit(request, tenant.name, 1, 0.0, None))
    ahead.service_s = 1.51
    queues.place(ahead)
    order = [tenant.name for tenant in queues.in_order(is_patient_first=False)]
    assert order == ["e", "l", "a"]


def test_a_flood_does_not_run_before_whoever_came_after_it():
    scheduler = one_lane(tenants="ab", capacity=1, rows=1)
    for request in range(9):
        submit(scheduler, request, "a")
    first = [served(scheduler.decide(0.0))[0][0] for _ in range(3)]
    submit(scheduler, 9, "b")
    assert [*first, served(scheduler.decide(0.0))[0][0]] == ["a", "a", "a", "b"]


@pytest.mark.parametrize(
    ("slots", "weights"),
    [(1, (3, 1)), (2, (1, 1, 1)), (2, (1, 1, 10)), (2, (4, 2, 1)), (4, (1,) * 5)],
)
def test_whoever_comes_last_waits_for_a_step_or_two_not_for_queues(slots, weights):
    """However many queues fill the steps, and of whatever weight."""
    num_floods = len(weights) - 1
    owners = np.append(np.repeat(np.arange(num_floods), 200), num_floods)
    trace = Arrivals(np.zeros(len(owners)), owners)
    table = {(k, 1): 1.0 for k in (1, 2, 4) if k <= slots}
    run = simulate(trace, table, weights=weights)
    assert run.latency_s[-1] <= 1 + max(weights)


@pytest.mark.parametrize("is_strict", [False, True])
def test_who_is_beyond_a_strict_share_fills_slots_but_chooses_no_bucket(is_strict):
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, strict_shares=is_strict)
    for name in "abc":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (8,), dict.fromkeys("abc", (0,))))
    for slots, step_s in ((1, 1.0), (2, 1.2), (4, 1.5)):
        scheduler.handle(Ready("all", Bucket((slots,), 1), step_s))
    for request in range(20):
        submit(scheduler, request, "a")
    for _ in range(2):  # alone it has all there is
        assert len(served(scheduler.decide(0.0))) == 4
    submit(scheduler, 20, "b")
    # For one row a step of one slot is best, for four one of four.
    more = [("a", (request,)) for request in (8, 9, 10)]
    assert served(scheduler.decide(0.0)) == [("b", (20,))] + more * (not is_strict)
    for request, name in enumerate("bc", 21):
        submit(scheduler, request, name)
    scheduler.handle(Ready("all", Bucket((2,), 1), 9.0))  # so two are best in four
    first, second, *rest = served(scheduler.decide(0.0))
    assert {first, second} == {("b", (21,)), ("c", (22,))}
    assert [who for who, _ in rest] == ["a", "a"]  # what is left free


def test_who_is_beyond_a_strict_share_has_two_slots_of_those_left_free():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, strict_shares=True)
    for name in "abcdef":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (16,), dict.fromkeys("abcdef", (0,))))
    for slots, step_s in ((1, 1.0), (8, 1.2)):
        scheduler.handle(Ready("all", Bucket((slots,), 1), step_s))
    for request in range(40):
        submit(scheduler, request, "a")
    for _ in range(2):
        assert len(served(scheduler.decide(0.0))) == 8
    for request, name in enumerate("bcd", 40):
        submit(scheduler, request, name)
    found = [who for who, _ in served(scheduler.decide(0.0))]
    assert sorted(found) == ["a", "a", "b", "c", "d"]


def test_a_backlog_is_as_many_tenants_as_the_last_step_had_slots_in_use():
    scheduler = one_lane(rows=1)
    scheduler.handle(Ready("all", Bucket((4,), 1, is_open=True), 0.011))
    for request, tenant in enumerate("aaab"):
        submit(scheduler, request, tenant)
    assert len(served(scheduler.decide(0.0))) == 4  # of two tenants
    for request, tenant in enumerate("abc", 4):
        submit(scheduler, request, tenant)
        assert not scheduler.has_backlog  # who comes next has room in the next step
    scheduler.handle(Join("d"))
    submit(scheduler, 7, "d")
    assert scheduler.has_backlog


def test_it_takes_the_bucket_of_most_rows_a_second():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    for name in "abcd":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (8,), dict.fromkeys("abcd", (0,))))
    scheduler.handle(Ready("all", Bucket((4,), 1), 1.0))
    scheduler.handle(Ready("all", Bucket((2,), 1), 0.3))
    for request, name in enumerate("abcd"):
        submit(scheduler, request, name)
    assert scheduler.decide(0.0).batch.bucket == Bucket((2,), 1)
    scheduler.handle(Ready("all", Bucket((4,), 1), 0.1))
    submit(scheduler, 8, "a")
    submit(scheduler, 9, "b")
    assert scheduler.decide(0.0).batch.bucket == Bucket((4,), 1)


def test_a_full_queue_refuses_exactly_what_is_too_much():
    scheduler = one_lane(max_queue_size=3)
    for request in range(3):
        submit(scheduler, request, "a")
    with pytest.raises(QueueFullError, match="3 requests waiting") as caught:
        submit(scheduler, 3, "a")
    assert caught.value.jobs == ("a",)
    submit(scheduler, 4, "b")  # another tenant's queue is its own
    assert scheduler.num_queued == 4


@pytest.mark.parametrize("deadline_s", [1.0, 0.5, -math.inf])
def test_a_deadline_that_has_passed_is_refused(deadline_s):
    scheduler = one_lane()
    with pytest.raises(DeadlineError):
        submit(scheduler, 0, "a", now_s=1.0, deadline_s=deadline_s)
    assert scheduler.num_queued == 0


def test_a_leaving_tenant_is_served_but_takes_no_more():
    scheduler = one_lane()
    submit(scheduler, 0, "a")
    scheduler.handle(Leave("a"))
    with pytest.raises(ClosedError):
        submit(scheduler, 1, "a")
    assert served(scheduler.decide(0.0)) == [("a", (0,))]
    with pytest.raises(ClosedError):
        submit(scheduler, 2, "a")


def test_a_request_too_large_for_one_bucket_runs_in_another():
    scheduler = one_lane(rows=2)
    scheduler.handle(Ready("all", Bucket((4,), 1), 1e-6))  # tempting, but too small
    submit(scheduler, 0, "a", rows=2)
    decision = scheduler.decide(0.0)
    assert served(decision) == [("a", (0,))]
    assert decision.batch.bucket.rows == 2


def test_two_species_run_in_one_step():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    for name in "ab":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (1, 1), {"a": (0,), "b": (1,)}))
    scheduler.handle(Ready("all", Bucket((1, 1), 1), 0.01))
    scheduler.handle(Ready("all", Bucket((1, 0), 1), 0.01))
    submit(scheduler, 0, "a")
    submit(scheduler, 1, "b")
    assert served(scheduler.decide(0.0)) == [("a", (0,)), ("b", (1,))]


def test_members_may_change_while_the_buckets_stay_ready():
    scheduler = one_lane(tenants="a")
    scheduler.handle(Join("z"))
    submit(scheduler, 0, "z")
    assert scheduler.decide(0.0).batch is None
    members = {"a": (0,), "z": (0,)}
    scheduler.handle(Install("all", (4,), members, keeps_ready=True))
    assert served(scheduler.decide(0.0)) == [("z", (0,))]
    scheduler.handle(Install("all", (4,), members))
    submit(scheduler, 1, "z")
    assert scheduler.decide(0.0).batch is None  # the new step has no bucket yet


def test_requests_of_two_lengths_never_share_a_slot():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=4)
    scheduler.handle(Join("a"))
    scheduler.handle(Install("all", (1, 1), {"a": (0, 1)}))
    scheduler.handle(Ready("all", Bucket((1, 1), 4), 0.01))
    for request, length in enumerate([0, 1, 0, 1, 1]):
        scheduler.handle(Submit(request, "a", 1, 0.0, None, length))
    chunks = scheduler.decide(0.0).batch.chunks
    found = [(c.requests, c.length, c.species) for c in chunks]
    assert found == [((0, 2), 0, 0), ((1, 3, 4), 1, 1)]
