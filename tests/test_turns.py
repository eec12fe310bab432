"""Turns of threads are short while a lane is built, and then as they were."""

import sys

import pytest

from stfuse._turns import Turns
from stfuse.testing import FakeDevice, affine_job
from tests.serving import serve, wait_for


@pytest.fixture(autouse=True)
def interval():
    """Give the process's interval, and bring it back."""
    before_s = sys.getswitchinterval()
    yield before_s
    sys.setswitchinterval(before_s)


def test_the_last_one_out_brings_the_interval_back(interval):
    turns = Turns()
    with turns:
        assert sys.getswitchinterval() < interval
        with pytest.raises(ValueError), turns:
            raise ValueError
        assert sys.getswitchinterval() < interval
    assert sys.getswitchinterval() == interval


def test_an_interval_that_is_short_or_set_meanwhile_stays():
    sys.setswitchinterval(2e-5)
    with Turns():
        assert sys.getswitchinterval() == pytest.approx(2e-5)
        sys.setswitchinterval(0.02)
    assert sys.getswitchinterval() == pytest.approx(0.02)


def test_turns_are_short_while_a_lane_is_compiled_and_only_then(interval):
    seen_s = []

    class Device(FakeDevice):
        def compile(self, step_fn, *specs):
            seen_s.append(sys.getswitchinterval())
            return super().compile(step_fn, *specs)

    with serve(affine_job("a", width=7), device=Device(), max_batch_size=2):
        # The canary's step comes first, before there is anybody to serve.
        assert len(seen_s) > 1 and max(seen_s[1:]) < interval
        wait_for(lambda: sys.getswitchinterval() == interval)
