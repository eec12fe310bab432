"""A step waits for company: until when, for whom, and what ends that sooner."""

import pytest

from stfuse._scheduler import Scheduler
from stfuse._types import Bucket, Drain, Install, Join, Policy, Ready
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


def test_what_fills_the_step_or_is_urgent_ends_a_wait_for_company():
    scheduler = one_lane(tenants="abcde", max_queue_delay_s=0.5)
    assert scheduler.is_news("a", None)
    submit(scheduler, 0, "a", now_s=1.0)
    assert scheduler.decide(1.0).wait_until_s == 1.5
    submit(scheduler, 1, "b", now_s=1.1)
    submit(scheduler, 2, "c", now_s=1.1)
    assert not scheduler.is_news("c", None)
    assert not scheduler.is_news("c", 9.0)
    assert scheduler.is_news("c", 1.505)  # less than a step after the wait
    submit(scheduler, 3, "d", now_s=1.2)
    assert scheduler.is_news("d", None)
    submit(scheduler, 4, "e", now_s=1.2)  # who finds no place waits: no use in company
    assert len(served(scheduler.decide(1.2))) == 4
    assert scheduler.is_news("a", None)


def test_a_flood_s_backlog_does_not_end_a_wait_for_company():
    scheduler = Scheduler(
        Policy.SPACE_TIME, max_batch_size=1, max_queue_delay_s=0.5, strict_shares=True
    )
    for name in "abc":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (32,), dict.fromkeys("abc", (0,))))
    for slots, step_s in STEP_S.items():
        scheduler.handle(Ready("all", Bucket((slots,), 1), step_s))
    submit(scheduler, 1000, "b")  # so that others are about
    assert scheduler.decide(0.0).wait_until_s == 0.5
    assert served(scheduler.decide(0.5)) == [("b", (1000,))]
    for request in range(100):
        submit(scheduler, request, "a", now_s=0.5)
    while served(scheduler.decide(0.5)):
        pass  # until it is beyond its share, and then has had a step of its own
    assert 0 < len(scheduler.queued("a")) < 90
    submit(scheduler, 1001, "b", now_s=0.6)
    assert scheduler.decide(0.6).wait_until_s == 1.1
    assert not scheduler.is_news("c", None)
    chunks = served(scheduler.decide(1.1))
    assert chunks[0] == ("b", (1001,))
    assert {name for name, _ in chunks[1:]} <= {"a"}
