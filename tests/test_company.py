"""A step waits for company: until when, for whom, and what ends that sooner."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from stfuse._scheduler import Scheduler
from stfuse._types import (
    Bucket,
    Cancel,
    Drain,
    Install,
    Join,
    Leave,
    Policy,
    Ready,
)
from stfuse.testing import FakeDevice, affine_job
from tests.serving import ROW, serve
from tests.test_scheduler import one_lane, served, submit
from tests.test_shares import STEP_S


def test_a_request_waits_for_company_only_as_long_as_it_may():
    scheduler = one_lane(max_queue_delay_s=0.5)
    submit(scheduler, 0, "a", now_s=1.0)
    decision = scheduler.decide(1.1)
    assert decision.batch is None
    assert decision.wait_until_s == 1.5
    assert served(scheduler.decide(1.5)) == [("a", (0,))]
    submit(scheduler, 1, "a", now_s=2.0, deadline_s=2.2)
    assert scheduler.decide(2.0).wait_until_s == pytest.approx(2.19)
    scheduler.handle(Drain())
    assert served(scheduler.decide(2.0)) == [("a", (1,))]


def waiting(slots=(1, 2, 4)):
    """Return a scheduler where a waits from 1.0 to 1.5; d is of another lane."""
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, max_queue_delay_s=0.5)
    for name in "abcde":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (4,), dict.fromkeys("abce", (0,))))
    for num in slots:
        scheduler.handle(Ready("all", Bucket((num,), 1), 0.2))
    scheduler.handle(Install("other", (1,), {"d": (0,)}))
    scheduler.handle(Ready("other", Bucket((1,), 1), 0.01))
    submit(scheduler, 0, "a", now_s=1.0)
    assert scheduler.decide(1.0).wait_until_s == 1.5
    return scheduler


@pytest.mark.parametrize(
    ("come", "ends"),
    [
        ([("b", None)], False),
        ([("b", None), ("c", 9.0)], False),
        ([("b", 1.71)], False),
        ([("b", 1.69)], True),  # its step could be as long as 0.2 s after the wait
        ([("b", None), ("c", None), ("e", None)], True),  # the step is full
        ([("a", None)], False),  # two slots of a step that reads weights by index
        ([("a", None), ("a", None)], True),  # has three no more
        ([("b", None), ("a", None)], True),  # the second one's is taken
        ([("d", None)], True),
    ],
)
def test_what_has_no_place_or_fills_the_step_or_is_urgent_ends_a_wait(come, ends):
    scheduler = waiting()
    for request, (name, deadline_s) in enumerate(come, 1):
        assert scheduler.is_resting
        submit(scheduler, request, name, now_s=1.1, deadline_s=deadline_s)
    assert scheduler.is_resting is not ends
    decision = scheduler.decide(1.1)
    if ends:
        assert decision.batch or decision.wait_until_s < 1.5
    else:
        assert decision.wait_until_s == 1.5
        assert len(served(scheduler.decide(1.5))) == 1 + len({name for name, _ in come})


def test_a_second_request_ends_a_wait_where_each_has_one_slot():
    scheduler = waiting(slots=(4,))
    submit(scheduler, 1, "a", now_s=1.1)
    assert not scheduler.is_resting
    assert served(scheduler.decide(1.1)) == [("a", (0,))]


def test_a_decision_to_wait_stands_until_something_comes_or_time_is_up():
    scheduler, looks = waiting(), []
    decide = scheduler._decide
    scheduler._decide = lambda now_s: looks.append(now_s) or decide(now_s)
    submit(scheduler, 1, "b", now_s=1.1)
    assert scheduler.decide(1.2).wait_until_s == 1.5
    assert not looks
    scheduler.handle(Ready("all", Bucket((2,), 1), 0.02))  # a prediction that changes
    assert scheduler.decide(1.2).wait_until_s == 1.5
    assert not looks
    assert scheduler.decide(0.9).batch is not None  # the clock went back
    assert looks == [0.9]


@pytest.mark.parametrize(
    "event",
    [
        Cancel(0),
        Drain(),
        Leave("a"),
        Install("all", (8,), dict.fromkeys("abce", (0,)), keeps_ready=True),
        Ready("all", Bucket((8,), 1), 0.01),
    ],
)
def test_a_decision_to_wait_falls_with_what_it_was_about(event):
    scheduler = waiting()
    scheduler.handle(event)
    assert not scheduler.is_resting


def test_a_step_that_takes_longer_than_predicted_begins_sooner():
    scheduler = waiting()
    submit(scheduler, 1, "b", now_s=1.1, deadline_s=1.8)
    assert scheduler.decide(1.1).wait_until_s == 1.5
    scheduler.handle(Ready("all", Bucket((4,), 1), 0.2, 0.29))
    assert scheduler.decide(1.2).wait_until_s == 1.5
    scheduler.handle(Ready("all", Bucket((2,), 1), 0.4, 0.5))
    assert not scheduler.is_resting


def strict(**options):
    """Return a scheduler with strict shares, where others are about."""
    options |= {"max_batch_size": 1, "strict_shares": True}
    scheduler = Scheduler(Policy.SPACE_TIME, max_queue_delay_s=0.5, **options)
    for name in "abc":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (32,), dict.fromkeys("abc", (0,))))
    for slots, step_s in STEP_S.items():
        scheduler.handle(Ready("all", Bucket((slots,), 1), step_s))
    submit(scheduler, 1000, "b")
    assert scheduler.decide(0.0).wait_until_s == 0.5
    assert served(scheduler.decide(0.5)) == [("b", (1000,))]
    return scheduler


def flood(scheduler, now_s):
    """Have tenant a ask for far more than its share, and served until it is beyond."""
    for request in range(100):
        submit(scheduler, request, "a", now_s=now_s)
    while served(scheduler.decide(now_s)):
        pass  # until it has had a step of its own
    assert 0 < len(scheduler.queued("a")) < 90


def test_a_flood_s_backlog_does_not_end_a_wait_for_company():
    scheduler = strict()
    flood(scheduler, 0.5)
    submit(scheduler, 1001, "b", now_s=0.6)
    assert scheduler.decide(0.6).wait_until_s == 1.1
    submit(scheduler, 1002, "c", now_s=0.6)
    assert scheduler.is_resting
    chunks = served(scheduler.decide(1.1))
    assert chunks[0] == ("b", (1001,))
    assert {name for name, _ in chunks[1:]} <= {"a", "c"}


def test_nobody_who_would_lose_of_its_share_waits_for_others_company():
    scheduler = strict()
    for request in range(30):
        submit(scheduler, request, "a", now_s=0.6)
    submit(scheduler, 1001, "b", now_s=0.6)
    assert {name for name, _ in served(scheduler.decide(0.6))} == {"a", "b"}
    # It had ten slots, a second's worth; a third of the time is its own.
    submit(scheduler, 1002, "b", now_s=3.7)
    assert {name for name, _ in served(scheduler.decide(3.7))} == {"a", "b"}


def test_a_wait_ends_before_who_was_beyond_its_share_loses_of_it():
    scheduler = strict()
    flood(scheduler, 0.5)
    submit(scheduler, 1001, "b", now_s=2.7)  # with a claim to a slot, a waits, too
    assert scheduler.decide(2.7).wait_until_s == 3.2
    assert {name for name, _ in served(scheduler.decide(3.2))} == {"a", "b"}
    submit(scheduler, 1002, "b", now_s=5.3)
    claim_s = scheduler.decide(5.3).wait_until_s
    assert claim_s == pytest.approx(5.6)  # a has all that it may have
    assert not served(scheduler.decide(claim_s - 1e-3))
    assert {name for name, _ in served(scheduler.decide(claim_s + 1e-6))} == {"a", "b"}


@pytest.mark.parametrize("deadline_s", [None, 1e12])
def test_a_wait_may_be_without_end(deadline_s):
    jobs = [affine_job(name) for name in "ab"]
    # Steps so long that two slots are better than one, whatever else this machine does.
    device = FakeDevice(SimpleNamespace(advance=time.sleep), step_s=0.05)
    with serve(*jobs, max_queue_delay_s=float("inf"), device=device) as engine:
        first = engine.submit("a", ROW, deadline_s=deadline_s)
        with pytest.raises(TimeoutError):
            first.result(0.1)
        engine.infer("b", ROW, timeout_s=60)  # all slots are taken
        np.testing.assert_array_equal(first.result(60), ROW * 3)
        assert engine.health().restarts == 0


@pytest.mark.parametrize(
    ("times", "pays"), [((0.01, 0.015), True), ((0.01, 0.05), False)]
)
def test_a_second_request_ends_a_wait_if_a_step_with_both_does_not_pay(times, pays):
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, max_queue_delay_s=0.5)
    for name in "ab":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (4,), dict.fromkeys("ab", (0,))))
    for slots, step_s in zip((1, 2), times, strict=True):
        scheduler.handle(Ready("all", Bucket((slots,), 1), step_s))
    scheduler.handle(Ready("all", Bucket((4,), 1), 0.2))
    submit(scheduler, 0, "a", now_s=1.0)
    assert scheduler.decide(1.0).wait_until_s == 1.5
    submit(scheduler, 1, "a", now_s=1.1)
    assert scheduler.is_resting is pays
    assert served(scheduler.decide(1.1)) == ([] if pays else [("a", (0,))])


def test_a_second_request_ends_a_wait_if_the_step_s_slots_are_too_small_for_it():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=4, max_queue_delay_s=0.5)
    scheduler.handle(Join("a"))
    scheduler.handle(Install("all", (4,), {"a": (0,)}))
    scheduler.handle(Ready("all", Bucket((2,), 1), 0.1))
    scheduler.handle(Ready("all", Bucket((4,), 4), 0.1))
    submit(scheduler, 0, "a", now_s=1.0)
    assert scheduler.decide(1.0).wait_until_s == 1.5
    submit(scheduler, 1, "a", now_s=1.1, rows=4)
    assert not scheduler.is_resting


def test_two_of_somebody_who_came_later_have_no_place_either():
    scheduler = waiting(slots=(4,))
    submit(scheduler, 1, "b", now_s=1.1)
    assert scheduler.is_resting
    submit(scheduler, 2, "b", now_s=1.1)
    assert not scheduler.is_resting


def test_who_has_deadlines_and_a_claim_does_not_wait_for_others_company():
    """It has one slot left of its share, three deadlines, and the device is idle."""
    options = {"strict_shares": True, "max_queue_delay_s": 0.5}
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, **options)
    names = ["a", "c", *(f"other-{i}" for i in range(98))]
    for name in names:
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (128,), dict.fromkeys(names, (0,))))
    for slots, step_s in ((1, 0.01), (4, 0.1)):
        scheduler.handle(Ready("all", Bucket((slots,), 1), step_s))
    now_s, done, expired = 0.0, [], []

    def serve_all():
        nonlocal now_s
        while scheduler.num_queued:
            decision = scheduler.decide(now_s)
            done.extend(served(decision))
            expired.extend(decision.expired)
            batch = decision.batch
            now_s = now_s + batch.predicted_s if batch else decision.wait_until_s

    for request in range(7):
        submit(scheduler, request, "c", now_s=now_s)
    serve_all()
    for request in range(7, 10):
        submit(scheduler, request, "c", now_s=now_s, deadline_s=now_s + 0.2)
    submit(scheduler, 10, "a", now_s=now_s)
    serve_all()
    assert not expired
    assert len(done) == 11


def test_who_has_deadlines_and_no_claim_waits_only_until_it_has_one():
    scheduler = strict()
    for request in range(100):
        submit(scheduler, request, "a", now_s=0.5, deadline_s=1e3)
    while served(scheduler.decide(0.5)):
        pass
    submit(scheduler, 1001, "b", now_s=2.3)
    claim_s = scheduler.decide(2.3).wait_until_s
    assert 2.3 < claim_s < 2.8
    assert not served(scheduler.decide(claim_s - 1e-3))
    assert {name for name, _ in served(scheduler.decide(claim_s))} == {"a", "b"}


def test_what_waited_for_company_until_its_deadline_is_near_is_not_given_up_then():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, max_queue_delay_s=0.5)
    scheduler.handle(Join("a"))
    scheduler.handle(Install("all", (4,), {"a": (0,)}))
    scheduler.handle(Ready("all", Bucket((4,), 1), 0.001, 0.001, host_s=0.003))
    for request in (0, 1):
        submit(scheduler, request, "a", deadline_s=0.3)
    assert served(scheduler.decide(0.0)) == [("a", (0,))]  # and leaves work waiting
    until_s = scheduler.decide(0.001).wait_until_s
    assert until_s == pytest.approx(0.299)
    assert served(scheduler.decide(until_s)) == [("a", (1,))]


def test_one_tenant_alone_does_not_wait_for_a_step_that_it_cannot_fill():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1, max_queue_delay_s=0.05)
    scheduler.handle(Join("a"))
    scheduler.handle(Install("all", (64,), {"a": (0,)}))
    for slots, step_ms in {1: 0.7, 2: 0.8, 4: 0.93, 8: 1.24, 16: 2.23}.items():
        scheduler.handle(Ready("all", Bucket((slots,), 1), step_ms / 1e3))
    for request in range(5):
        submit(scheduler, request, "a")
        assert (len(served(scheduler.decide(0.0))) == 4) is (request == 4)


def test_under_policy_time_nobody_waits_for_company():
    scheduler = one_lane(Policy.TIME, rows=8, max_queue_delay_s=0.5)
    submit(scheduler, 0, "a")
    assert served(scheduler.decide(0.0)) == [("a", (0,))]
    alone = one_lane(Policy.EXCLUSIVE, rows=8, max_queue_delay_s=0.5)
    submit(alone, 0, "a")  # others of its own may join it
    assert alone.decide(0.0).wait_until_s == 0.5


def test_who_is_removed_waits_for_no_company():
    device = FakeDevice(SimpleNamespace(advance=time.sleep), step_s=0.01)
    jobs = [affine_job(name) for name in "abc"]
    with serve(*jobs, max_queue_delay_s=float("inf"), device=device) as engine:
        future = engine.submit("a", ROW)
        time.sleep(0.1)
        assert not future.done()
        removing = threading.Thread(target=engine.remove, args=("a",))
        removing.start()
        np.testing.assert_array_equal(future.result(20), 3 * ROW)
        removing.join(20)
        assert not removing.is_alive()
