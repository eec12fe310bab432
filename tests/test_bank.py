"""The laws of the bank: what is written to a slot is read from it, and nowhere else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stfuse import _bank, _tree
from stfuse._cache import next_power_of_two
from tests.cases import assert_bitwise

SHAPES = [(), (0, 2), (2, 2)]
DTYPES = ["f4", "i1", "?", ml_dtypes.bfloat16]


def draw_leaf(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 200, shape).astype(dtype)


@st.composite
def species(draw):
    """Draw specs, the leaves of some jobs, and a capacity.

    A seed per leaf and job: where seeds are equal, so are the bytes.
    """
    num_leaves = draw(st.integers(1, 3))
    kinds = [
        (draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES)))
        for _ in range(num_leaves)
    ]
    specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds]
    num_jobs = draw(st.integers(1, 4))
    seeds = st.integers(0, 2)
    members = [
        [draw_leaf(shape, dtype, draw(seeds)) for shape, dtype in kinds]
        for _ in range(num_jobs)
    ]
    new = [draw_leaf(shape, dtype, draw(seeds)) for shape, dtype in kinds]
    capacity = num_jobs + draw(st.integers(0, 2))
    return specs, members, new, capacity


def read(leaves, specs, slot):
    return [np.asarray(x) for x in _bank.read(leaves, specs, slot)]


def assert_slots(leaves, specs, members):
    for slot, member in enumerate(members):
        assert_bitwise(read(leaves, specs, slot), member)


@given(species())
def test_reading_a_slot_after_pack_gives_what_was_packed(drawn):
    specs, members, _, capacity = drawn
    leaves = _bank.pack(members, specs, capacity)
    assert_slots(leaves, specs, members)
    for leaf, spec in zip(leaves, specs, strict=True):
        assert isinstance(leaf, jax.Array) and leaf.dtype == spec.dtype
        assert leaf.shape in (spec.shape, (capacity, *spec.shape))
        if leaf.ndim > spec.ndim:  # slots that no job has are zero
            assert not np.asarray(leaf[len(members) :]).any()


@given(species(), st.data())
def test_write_changes_one_slot_and_no_other(drawn, data):
    specs, members, new, capacity = drawn
    slot = data.draw(st.integers(0, len(members) - 1))
    leaves = _bank.pack(members, specs, capacity)
    if capacity > 1:
        leaves = _bank.unshare(leaves, specs, capacity, new)
        written = _bank.write(leaves, specs, slot, new)
    else:  # a lone job's leaves have no slots to write to: it is packed anew
        written = _bank.pack([new], specs, 1)
    assert_slots(leaves, specs, members)
    assert_slots(written, specs, [*members[:slot], new, *members[slot + 1 :]])


@given(species())
def test_unshare_changes_no_slot_and_makes_room_for_what_differs(drawn):
    specs, members, new, capacity = drawn
    leaves = _bank.pack(members, specs, capacity)
    wider = _bank.unshare(leaves, specs, capacity, new)
    assert_slots(wider, specs, members)
    assert _bank.fits_shared(wider, specs, new)
    if _bank.fits_shared(leaves, specs, new):
        assert all(a is b for a, b in zip(leaves, wider, strict=True))


@given(species(), st.integers(0, 3))
def test_grow_changes_no_slot_and_adds_zeros(drawn, more):
    specs, members, _, capacity = drawn
    leaves = _bank.pack(members, specs, capacity)
    grown = _bank.grow(leaves, specs, capacity + more)
    assert_slots(grown, specs, members)
    for leaf, before, spec in zip(grown, leaves, specs, strict=True):
        if before.ndim == spec.ndim:
            assert leaf is before
        else:
            assert leaf.shape[0] == capacity + more
            assert not np.asarray(leaf[capacity:]).any()


def test_write_reuses_the_memory_that_it_is_given():
    specs = [jax.ShapeDtypeStruct((256,), np.float32)]
    members = [[np.full(256, i, "f")] for i in range(4)]
    leaves = _bank.pack(members, specs, 4)
    # On a CPU the packed stack may lie in NumPy's memory: the first write moves it.
    leaves = _bank.write(leaves, specs, 0, members[0], donate=True)
    address = leaves[0].unsafe_buffer_pointer()
    new = [np.full(256, 9, "f")]
    written = _bank.write(leaves, specs, 2, new, donate=True)
    assert written[0].unsafe_buffer_pointer() == address
    assert leaves[0].is_deleted()
    assert_slots(written, specs, [*members[:2], new, members[3]])


def test_write_keeps_the_old_bank_unless_it_is_given_away():
    specs = [jax.ShapeDtypeStruct((3,), np.float32)]
    members = [[np.full(3, i, "f")] for i in range(2)]
    leaves = _bank.pack(members, specs, 2)
    _bank.write(leaves, specs, 0, [np.full(3, 9, "f")])
    assert_slots(leaves, specs, members)


def test_the_bank_is_a_copy_that_its_owner_cannot_change():
    specs = [jax.ShapeDtypeStruct((64,), np.float32)] * 2
    raw = np.zeros(64 * 4 + 64, "u1")
    start = -raw.ctypes.data % 64  # aligned, as JAX likes to keep arrays in place
    mine = raw[start : start + 256].view("f4")
    mine[:] = np.arange(64)
    shared = mine.copy()
    leaves = _bank.pack([[mine, mine], [mine, shared]], specs, 2)
    alone = _bank.pack([[mine, mine]], specs, 1)
    mine[:] = -1
    for leaf in (*leaves, *alone):
        np.testing.assert_array_equal(leaf, np.arange(64))


A = np.arange(3.0)
NAN = np.array([np.nan, 1.0])
# What two jobs bring for one leaf, and whether it is kept once.
SHARING = {
    "equal objects": (A, A, True),
    "equal bytes": (A, A.copy(), True),
    "equal bytes, jax and numpy": (A.astype("f"), jnp.arange(3.0), True),
    "equal bytes, other strides": (A, np.repeat(A, 2)[::2], True),
    "equal NaNs": (NAN, NAN.copy(), True),
    "nothing": (np.zeros((0, 2)), np.zeros((0, 2)), True),
    "unequal values": (A, A + 1, False),
    "zeros of unequal sign": (np.array([0.0, 1]), np.array([-0.0, 1]), False),
    "one value, by accident": (np.zeros(3), np.zeros(3), False),
    "one number, by accident": (np.float32(2), np.float32(2), False),
    "one value, on purpose": (B := np.zeros(3), B, True),
}


@pytest.mark.parametrize("a, b, is_shared", SHARING.values(), ids=SHARING)
def test_a_leaf_is_kept_once_when_jobs_share_it(a, b, is_shared):
    spec = _tree.spec_of(a)
    (leaf,) = _bank.pack([[a], [b]], [spec], 2)
    assert leaf.shape == (a.shape if is_shared else (2, *a.shape))


def test_a_lone_job_has_no_slot_axis_unless_there_is_room_for_more():
    specs = [_tree.spec_of(A)]
    assert _bank.pack([[A]], specs, 1)[0].shape == (3,)
    assert _bank.pack([[A]], specs, 2)[0].shape == (2, 3)


def test_shared_leaves_are_unshared_only_where_they_differ():
    specs = [_tree.spec_of(A)] * 2
    leaves = _bank.pack([[A, A + 1], [A, A + 1]], specs, 2)
    assert [x.shape for x in leaves] == [(3,), (3,)]
    assert _bank.fits_shared(leaves, specs, [A.copy(), A + 1])
    assert not _bank.fits_shared(leaves, specs, [A, A])
    wider = _bank.unshare(leaves, specs, 2, [A, A])
    assert [x.shape for x in wider] == [(3,), (2, 3)]


def test_traced_params_are_never_taken_for_shared():
    specs = [_tree.spec_of(A)]
    members = [[A.astype("f")], [A.astype("f")]]
    shapes = []

    @jax.jit
    def pack_and_write(x):
        leaves = _bank.pack([[x], members[1]], specs, 2)
        shapes.append(leaves[0].shape)
        shared = _bank.pack(members, specs, 2)
        wider = _bank.unshare(shared, specs, 2, [x])
        return leaves, _bank.write(wider, specs, 0, [x])

    packed, written = pack_and_write(A.astype("f") + 5)
    assert shapes == [(2, 3)]
    for leaves in (packed, written):
        assert_slots(leaves, specs, [[A.astype("f") + 5], members[1]])


def test_a_traced_bank_takes_params_that_are_not_traced():
    specs = [_tree.spec_of(A)]
    members = [[A.astype("f")], [A.astype("f")]]
    shared = _bank.pack(members, specs, 2)
    new = [A.astype("f") * 7]

    @jax.jit
    def write(leaves):
        return _bank.write(_bank.unshare(leaves, specs, 2, new), specs, 1, new)

    assert_slots(write(shared), specs, [members[0], new])


def test_typed_keys_are_params_like_others():
    keys = jax.random.split(jax.random.key(0), 3)
    specs = [_tree.spec_of(keys[0])]
    leaves = _bank.pack([[keys[0]], [keys[1]]], specs, 4)
    leaves = _bank.write(leaves, specs, 1, [keys[2]])
    (shared,) = _bank.pack([[keys[0]], [keys[0]]], specs, 2)
    data = jax.random.key_data
    np.testing.assert_array_equal(data(_bank.read(leaves, specs, 0)[0]), data(keys[0]))
    np.testing.assert_array_equal(data(_bank.read(leaves, specs, 1)[0]), data(keys[2]))
    assert shared.shape == ()


@given(st.integers(1, 1000))
def test_a_capacity_is_the_next_power_of_two(num_jobs):
    capacity = next_power_of_two(num_jobs)
    assert capacity & (capacity - 1) == 0
    assert capacity / 2 < num_jobs <= capacity
