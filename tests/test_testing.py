"""The tools that users test with behave as they say."""

import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, ManualClock, affine_job


def test_a_manual_clock_moves_only_when_told_to_and_wakes_listeners():
    clock, woken = ManualClock(1.0), []
    clock.subscribe(lambda: woken.append(clock()))
    assert clock() == clock() == 1.0
    clock.advance(0.5)
    clock.advance(-2.0)
    assert woken == [1.5, -0.5]


def test_an_affine_job_is_what_it_says_and_has_one_heavy_launch():
    job = affine_job("a", scale=3.0, shift=-1.0, width=2, weight=2.0)
    np.testing.assert_array_equal(
        job.apply_fn(job.params, np.array([[1.0, 2.0]], np.float32)), [[2.0, 5.0]]
    )
    assert job.weight == 2.0
    assert stfuse.fuse([job], cost="cpu").plan.num_launches == 1


@pytest.mark.parametrize("step_s", [0.25, lambda inputs: 0.25])
def test_a_fake_device_takes_the_time_it_is_told_to(step_s):
    clock = ManualClock()
    device = FakeDevice(clock, step_s=step_s)
    with stfuse.Engine(device=device, clock=clock) as engine:
        engine.add(affine_job("a")).result(60)
        before_s = clock()
        engine.infer("a", np.ones((1, 3), np.float32))
        assert clock() - before_s == 0.25
        stats = engine.stats()
        assert stats.tenants["a"].p50_s == pytest.approx(0.25, rel=0.05)
        (bucket,) = stats.buckets.values()
        assert bucket.predicted_s == bucket.measured_s == 0.25
    assert device.num_compiles > 0
    assert device.num_launches > 1
