"""A lane's bank as a state machine, against a dict of plain arrays.

Jobs of two species of unlike widths come and go, take new weights, and outgrow the
bank; whatever was done, each slot holds its job's weights bit for bit and padding is
zero.
"""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import stfuse
from stfuse import _bank, _lane
from stfuse._cache import next_power_of_two
from tests.cases import assert_bitwise
from tests.test_lane import DEVICE, H200, member

WIDTHS = (2, 3)
names = st.sampled_from([f"{kind}{i}" for kind in "ab" for i in range(4)])
seeds = st.integers(0, 5)  # where seeds are equal, so are the bytes
SHARED = np.arange(9, dtype=np.float32).reshape(3, 3)


def linear(params, x):
    return x @ params["trunk"] @ params["head"] + params["shift"]


def weights(name, seed, trunk=SHARED):
    rng = np.random.default_rng(seed)
    width = WIDTHS["ab".index(name[0])]
    head = rng.normal(size=(3, width)).astype(np.float32)
    return {"trunk": trunk, "head": head, "shift": np.float32(seed)}


def job_of(name, params):
    return stfuse.Job(name, linear, params, np.ones((1, 3), np.float32))


class BankMachine(RuleBasedStateMachine):
    @initialize(first=seeds, second=seeds)
    def pack(self, first, second):
        self.model = {"a0": weights("a0", first), "b0": weights("b0", second)}
        self.generation = 0
        self.build()

    def build(self):
        """Build the lane anew: how it grows, and how a leaf's sharing ends."""
        members = [member(job_of(n, p)) for n, p in self.model.items()]
        self.lane = _lane.build("all", members, DEVICE, cost=H200)
        kinds = [n[0] for n in self.model]
        expected = [next_power_of_two(kinds.count(k)) for k in dict.fromkeys(kinds)]
        assert list(self.lane.capacities) == expected

    def changed(self, name, params):
        self.generation += 1
        own = member(job_of(name, params))
        return dataclasses.replace(own, generation=self.generation)

    def is_whole(self, species, params):
        """Whether every leaf that is kept once has the value that a job brings."""
        layout, stacks = self.lane.layout, self.lane.bank.stacks
        rows = layout.leaf_rows(layout.bank_of[species])
        for leaf, own in enumerate(jax.tree.leaves(params)):
            i, _, _ = rows[leaf]
            a, _ = layout.array_of(i)
            is_own = layout.rows_of(i) == 1 or _bank.is_stacked(
                stacks[a], layout.params[i]
            )
            if not is_own and not np.array_equal(stacks[a], own):
                return False
        return True

    @rule(name=names, seed=seeds)
    def join(self, name, seed):
        if name in self.model:
            return
        params = weights(name, seed)
        species = [s for n, ((s, _),) in self.lane.places.items() if n[0] == name[0]]
        is_room = species and len(species) < self.lane.capacities[species[0]]
        has_joined = _lane.join(self.lane, self.changed(name, params))
        if is_room:
            assert has_joined == self.is_whole(species[0], params)
        self.model[name] = params
        if not has_joined:
            assert name not in self.lane.places
            self.build()

    @precondition(lambda self: len(self.model) > 1)
    @rule(name=names)
    def leave(self, name):
        if name in self.model:
            del self.model[name]
            _lane.leave(self.lane, name)

    @rule(name=names, seed=seeds, trunk_seed=st.just(0) | seeds)
    def swap(self, name, seed, trunk_seed):
        if name not in self.model:
            return
        params = weights(name, seed, SHARED + trunk_seed)
        ((species, _),) = self.lane.places[name]
        is_whole, new = self.is_whole(species, params), self.changed(name, params)
        assert _lane.write(self.lane, new) == is_whole
        if is_whole:
            assert self.lane.generations[name] == self.generation
            self.model[name] = params
        else:  # the sharing of a leaf ends; nothing of it was written
            self.assert_bank()
            self.model[name] = params
            self.build()

    @rule()
    def grow(self):
        self.build()

    @invariant()
    def assert_bank(self):
        if not hasattr(self, "lane"):
            return
        lane = self.lane
        assert set(lane.places) == set(self.model)
        taken = [place for places in lane.places.values() for place in places]
        assert len(set(taken)) == len(taken)
        host = _bank.Bank(tuple(map(np.asarray, lane.bank.stacks)))
        for name, ((species, slot),) in lane.places.items():
            b = lane.layout.bank_of[species]
            found = _bank.read(lane.layout, host, b, slot)
            expected = jax.tree.leaves(self.model[name])
            assert_bitwise(list(map(np.asarray, found)), expected)
        stacks = _bank.open_shelves(lane.layout, host.stacks)
        for stack, buffer in zip(stacks, lane.layout.params, strict=True):
            if _bank.is_stacked(stack, buffer):
                padding, at = np.array(stack), 0
                for (b, _), shape in zip(buffer.members, buffer.shapes, strict=True):
                    own = slice(at, at := at + lane.layout.capacities[b])
                    padding[(own, *map(slice, shape))] = 0
                assert not padding.any()


@pytest.mark.timeout(7200)  # 2,000 examples, if so many are asked for
def test_the_bank_holds_what_each_job_brought_in_any_order_of_events(
    seed, machine_settings
):
    run_state_machine_as_test(
        hypothesis.seed(seed)(BankMachine), settings=machine_settings
    )
