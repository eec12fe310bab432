"""Where leaves stand: many small stacks of one shape share an array."""

import jax
import numpy as np
import pytest

import stfuse
from stfuse import _bank
from stfuse._layout import _MANY_STACKS
from tests.cases import assert_bitwise, slot_of


def deep(params, x):
    for w, b in params["layers"]:
        x = x @ w + b
    return x * params["scale"]


def job(name, width, seed, num_layers=20):
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        return (rng.normal(size=shape) / width).astype("f")

    layers = [(drawn(width, width), drawn(width)) for _ in range(num_layers)]
    params = {"layers": layers, "scale": drawn(width)}
    return stfuse.Job(name, deep, params, np.ones((1, width), "f"))


@pytest.fixture(scope="module")
def fused():
    return stfuse.fuse([job("a", 5, 1), job("b", 3, 2), job("c", 3, 3)], cost="h200")


def test_many_small_stacks_stand_on_shelves(fused):
    layout = fused._layout
    assert len(layout.params) > _MANY_STACKS
    assert sorted(i for shelf in layout.shelves for i in shelf) == list(
        range(len(layout.params))
    )
    shapes = [x.shape for x in fused.pack().stacks]
    assert shapes == [(20, 3, 5, 5), (21, 3, 5)]


def test_few_stacks_stand_alone():
    few = stfuse.fuse([job("a", 5, 1, 2), job("b", 3, 2, 2)], cost="h200")
    assert all(len(shelf) == 1 for shelf in few._layout.shelves)


def test_reading_a_slot_gives_what_was_packed(fused):
    bank = fused.pack()
    for name, each in fused.jobs.items():
        assert_bitwise(slot_of(fused, bank, name), jax.tree.leaves(each.params))


def test_answers_and_gradients_are_those_alone(fused):
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.normal(size=(2, *each.row.shape)).astype("f")
        for name, each in fused.jobs.items()
    }
    bank = fused.pack()
    outs = fused(bank, inputs)

    def total(bank):
        return sum((y**2).sum() for y in fused(bank, inputs).values())

    grads = jax.grad(total)(bank)
    for name, each in fused.jobs.items():
        x = inputs[name]
        np.testing.assert_allclose(outs[name], deep(each.params, x), atol=1e-6)
        own = jax.grad(lambda p, x=x: (deep(p, x) ** 2).sum())(each.params)
        found = slot_of(fused, grads, name)
        for a, b in zip(found, jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_swap_writes_one_slot_and_no_other(fused):
    bank, new = fused.pack(), job("b", 3, 9).params
    changed = fused.swap(bank, "b", new)
    assert_bitwise(slot_of(fused, changed, "b"), jax.tree.leaves(new))
    for name in "ac":
        before = slot_of(fused, bank, name)
        assert_bitwise(slot_of(fused, changed, name), before)
    padding = np.asarray(changed.stacks[0])[:, 1:, 3:]
    assert not padding.any()


def test_what_all_slots_share_is_not_shelved():
    first = job("a", 4, 1)
    other = stfuse.Job("b", deep, first.params, np.ones((1, 4), "f"))
    shared = stfuse.fuse([first, other], cost="h200")
    assert all(len(shelf) == 1 for shelf in shared._layout.shelves)
    assert all(x.ndim in (1, 2) for x in shared.pack().stacks)
    alone, held = _bank.num_bytes(shared._layout, shared._columns(shared._species))
    assert alone == 2 * held
