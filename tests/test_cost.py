"""What the planner believes of a device."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stfuse
from stfuse import _cost

POSITIVE = st.floats(1e-9, 1e15)


@pytest.mark.parametrize("name", ["h200", "cpu"])
def test_a_committed_record_is_found_by_its_name(name):
    cost = _cost.resolve(name)
    assert cost.source == name
    assert _cost.resolve(cost) is cost


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="'tpu'; pass one of 'auto', 'h200', 'cpu'"):
        _cost.resolve("tpu")


def test_auto_is_measured_once_on_the_live_device():
    cost = _cost.resolve("auto")
    assert cost.source == jax.devices()[0].platform
    assert 0 < cost.launch_s < 1
    assert _cost.resolve("auto") is cost


def test_auto_may_be_asked_for_while_tracing():
    found = []
    jax.jit(lambda x: found.append(_cost.resolve("auto")) or x)(1.0)
    assert found == [_cost.resolve("auto")]


@given(POSITIVE, POSITIVE, POSITIVE, st.floats(0, 1e12), st.floats(0, 1e12))
def test_a_launch_takes_its_fixed_cost_and_the_slower_of_moving_and_computing(
    launch_s, bytes_per_s, flops_per_s, flops, num_bytes
):
    cost = stfuse.Cost(launch_s, bytes_per_s, flops_per_s)
    work_s = cost.seconds(flops, num_bytes) - cost.seconds(0, 0)
    assert cost.seconds(0, 0) == launch_s
    slower_s = max(flops / flops_per_s, num_bytes / bytes_per_s)
    assert work_s == pytest.approx(slower_s, rel=1e-6, abs=1e-6 * launch_s)


@pytest.mark.parametrize("rates", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, -1, 1)])
def test_rates_that_no_device_has_are_refused(rates):
    with pytest.raises(ValueError, match="every rate must be positive"):
        stfuse.Cost(*rates)
