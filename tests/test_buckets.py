"""What a bucket costs, what room it has, and what is told of either."""

import pytest

from stfuse._buckets import LaneBuckets, Times
from stfuse._scheduler import Scheduler
from stfuse._types import Bucket, Install, Join, Policy, Ready
from tests.test_scheduler import served, submit


def lane(capacity, **times):
    """Return a lane of one species; ``i2=0.1`` is a bucket of two slots, ``o`` open."""
    found = LaneBuckets((capacity,), ())
    for name, step_s in times.items():
        bucket = Bucket((int(name[1:]),), 1, name[0] == "o")
        found.predict(bucket, Times(step_s, step_s, step_s))
    return found


@pytest.mark.parametrize(
    ("times", "slots", "taken", "room"),
    [
        ({"i1": 1.0, "i2": 1.5, "i4": 2.0}, 1, 1, 3),
        ({"i1": 1.0, "i2": 1.5, "i4": 4.0}, 1, 1, 1),  # four at once do not pay
        ({"i4": 0.93, "o8": 1.24}, 4, 4, 0),  # five do not, though eight would
        ({"i1": 1.0, "i2": 2.5}, 1, 1, 0),
        ({"i1": 1.0, "i4": 2.0}, 4, 3, 1),
        ({"i1": 1.0, "i8": 2.0}, 8, 3, 0),  # each has its own slot of all
        ({"i1": 1.0, "i8": 2.0, "o8": 2.1}, 8, 3, 5),
        ({"i1": 1.0, "i8": 2.0, "o8": 9.0}, 8, 3, 0),
    ],
)
def test_somebody_has_a_second_slot_only_of_a_step_that_pays(times, slots, taken, room):
    assert lane(8, **times).room(Bucket((slots,), 1), taken) == room


def test_room_may_be_another_program_s():
    both = LaneBuckets((8, 8), ())
    for slots in ((2, 0), (4, 4)):
        both.predict(Bucket(slots, 1), Times(1.0, 1.0, 1.0))
    assert both.room(Bucket((2, 0), 1), 1) == 0


@pytest.mark.parametrize("host_s", [0.0, 0.3])
def test_a_step_costs_what_keeps_device_or_host_busy_for_longer(host_s):
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    for name in "abc":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (4,), dict.fromkeys("abc", (0,))))
    scheduler.handle(Ready("all", Bucket((2,), 1), 0.1, host_s=host_s))
    scheduler.handle(Ready("all", Bucket((4,), 1), 0.2, host_s=host_s))
    for request, tenant in enumerate("abc"):
        submit(scheduler, request, tenant)
    batch = scheduler.decide(0.0).batch
    # By the device alone two at a time are more a second than three.
    assert len(batch.chunks) == (3 if host_s else 2)
    assert batch.predicted_s == (0.2 if host_s else 0.1)


def test_what_the_host_does_makes_no_request_late_before_its_time():
    scheduler = Scheduler(Policy.SPACE_TIME, max_batch_size=1)
    for name in "ab":
        scheduler.handle(Join(name))
    scheduler.handle(Install("all", (4,), dict.fromkeys("ab", (0,))))
    scheduler.handle(Ready("all", Bucket((4,), 1), 0.001, 0.001, host_s=0.003))
    submit(scheduler, 0, "a")
    assert served(scheduler.decide(0.0)) == [("a", (0,))]
    submit(scheduler, 1, "b", now_s=0.0015, deadline_s=0.002)  # the device is free
