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
from stfuse._layout import Buffer, Layout
from tests.cases import assert_bitwise

SHAPES = [(), (0, 2), (2, 2)]
DTYPES = ["f4", "i1", "?", ml_dtypes.bfloat16]


def draw_leaf(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 200, shape).astype(dtype)


def layout_of(capacities, *arrays):
    """Return a layout of some banks, given ``(members, specs)`` for each array."""
    params = [
        Buffer(tuple(members), tuple(x.shape for x in specs), specs[0].dtype)
        for members, specs in arrays
    ]
    banks = tuple(range(len(capacities)))
    alone = tuple((i,) for i in range(len(params)))
    return Layout((banks,), banks, tuple(capacities), tuple(params), alone, (), ())


def single(specs, capacity):
    """Return the layout of one species: an array per leaf."""
    arrays = [([(0, leaf)], [spec]) for leaf, spec in enumerate(specs)]
    return layout_of([capacity], *arrays)


@st.composite
def species(draw):
    """Draw a layout of one species, the leaves of some jobs, and those of another.

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
    return single(specs, capacity), members, new


def read(layout, bank, b, slot):
    # On the host, where a slice of another shape compiles nothing.
    host = _bank.Bank(tuple(map(np.asarray, bank.stacks)))
    return [np.asarray(x) for x in _bank.read(layout, host, b, slot)]


def assert_slots(layout, bank, members, b=0):
    for slot, member in enumerate(members):
        assert_bitwise(read(layout, bank, b, slot), list(map(np.asarray, member)))


@given(species())
def test_reading_a_slot_after_pack_gives_what_was_packed(drawn):
    layout, members, _ = drawn
    bank = _bank.pack(layout, [members])
    assert_slots(layout, bank, members)
    (capacity,) = layout.capacities
    for stack, buffer in zip(bank.stacks, layout.params, strict=True):
        assert isinstance(stack, jax.Array) and stack.dtype == buffer.dtype
        (shape,) = buffer.shapes
        assert stack.shape in (shape, (capacity, *shape))
        if _bank.is_stacked(stack, buffer):  # slots that no job has are zero
            assert not np.asarray(stack)[len(members) :].any()


@given(species(), st.data())
def test_write_changes_one_slot_and_no_other(drawn, data):
    layout, members, new = drawn
    slot = data.draw(st.integers(0, len(members) - 1))
    bank = _bank.unshare(layout, _bank.pack(layout, [members]), 0, new)
    written = _bank.write(layout, bank, 0, slot, new)
    assert_slots(layout, bank, members)
    assert_slots(layout, written, [*members[:slot], new, *members[slot + 1 :]])


@given(species())
def test_unshare_changes_no_slot_and_makes_room_for_what_differs(drawn):
    layout, members, new = drawn
    bank = _bank.pack(layout, [members])
    wider = _bank.unshare(layout, bank, 0, new)
    assert_slots(layout, wider, members)
    assert _bank.fits_shared(layout, wider, 0, new)
    if _bank.fits_shared(layout, bank, 0, new):
        assert all(a is b for a, b in zip(bank.stacks, wider.stacks, strict=True))


def test_write_reuses_the_memory_that_it_is_given():
    layout = single([jax.ShapeDtypeStruct((256,), np.float32)], 4)
    members = [[np.full(256, i, "f")] for i in range(4)]
    bank = _bank.pack(layout, [members])
    # On a CPU the packed stack may lie in NumPy's memory: the first write moves it.
    bank = _bank.write(layout, bank, 0, 0, members[0], donate=True)
    address = bank.stacks[0].unsafe_buffer_pointer()
    new = [np.full(256, 9, "f")]
    written = _bank.write(layout, bank, 0, 2, new, donate=True)
    assert written.stacks[0].unsafe_buffer_pointer() == address
    assert bank.stacks[0].is_deleted()
    assert_slots(layout, written, [*members[:2], new, members[3]])


def test_write_keeps_the_old_bank_unless_it_is_given_away():
    layout = single([jax.ShapeDtypeStruct((3,), np.float32)], 2)
    members = [[np.full(3, i, "f")] for i in range(2)]
    bank = _bank.pack(layout, [members])
    _bank.write(layout, bank, 0, 0, [np.full(3, 9, "f")])
    assert_slots(layout, bank, members)


def test_the_bank_is_a_copy_that_its_owner_cannot_change():
    specs = [jax.ShapeDtypeStruct((64,), np.float32)] * 2
    raw = np.zeros(64 * 4 + 64, "u1")
    start = -raw.ctypes.data % 64  # aligned, as JAX likes to keep arrays in place
    mine = raw[start : start + 256].view("f4")
    mine[:] = np.arange(64)
    shared = mine.copy()
    bank = _bank.pack(single(specs, 2), [[[mine, mine], [mine, shared]]])
    alone = _bank.pack(single(specs, 1), [[[mine, mine]]])
    mine[:] = -1
    for stack in (*bank.stacks, *alone.stacks):
        np.testing.assert_array_equal(stack, np.arange(64))


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
    layout = single([_tree.spec_of(a)], 2)
    (stack,) = _bank.pack(layout, [[[a], [b]]]).stacks
    assert stack.shape == (a.shape if is_shared else (2, *a.shape))


def test_a_lone_job_has_no_slot_axis_unless_there_is_room_for_more():
    specs = [_tree.spec_of(A)]
    assert _bank.pack(single(specs, 1), [[[A]]]).stacks[0].shape == (3,)
    assert _bank.pack(single(specs, 2), [[[A]]]).stacks[0].shape == (2, 3)


def test_a_lone_jobs_leaf_is_replaced_as_it_stands():
    layout = single([_tree.spec_of(A)], 1)
    bank = _bank.pack(layout, [[[A]]])
    assert _bank.fits_shared(layout, bank, 0, [A + 1])
    assert _bank.unshare(layout, bank, 0, [A + 1]) == bank
    (stack,) = _bank.write(layout, bank, 0, 0, [A + 1]).stacks
    assert isinstance(stack, jax.Array) and stack.tolist() == [1, 2, 3]


def test_shared_leaves_are_unshared_only_where_they_differ():
    layout = single([_tree.spec_of(A)] * 2, 2)
    bank = _bank.pack(layout, [[[A, A + 1], [A, A + 1]]])
    assert [x.shape for x in bank.stacks] == [(3,), (3,)]
    assert _bank.fits_shared(layout, bank, 0, [A.copy(), A + 1])
    assert not _bank.fits_shared(layout, bank, 0, [A, A])
    wider = _bank.unshare(layout, bank, 0, [A, A])
    assert [x.shape for x in wider.stacks] == [(3,), (2, 3)]


def test_traced_params_are_never_taken_for_shared():
    layout = single([_tree.spec_of(A)], 2)
    members = [[A.astype("f")], [A.astype("f")]]
    shapes = []

    @jax.jit
    def pack_and_write(x):
        bank = _bank.pack(layout, [[[x], members[1]]])
        shapes.append(bank.stacks[0].shape)
        shared = _bank.pack(layout, [members])
        wider = _bank.unshare(layout, shared, 0, [x])
        return bank, _bank.write(layout, wider, 0, 0, [x])

    for bank in pack_and_write(A.astype("f") + 5):
        assert_slots(layout, bank, [[A.astype("f") + 5], members[1]])
    assert shapes == [(2, 3)]


def test_a_traced_bank_takes_params_that_are_not_traced():
    layout = single([_tree.spec_of(A)], 2)
    members = [[A.astype("f")], [A.astype("f")]]
    shared = _bank.pack(layout, [members])
    new = [A.astype("f") * 7]

    @jax.jit
    def write(bank):
        return _bank.write(layout, _bank.unshare(layout, bank, 0, new), 0, 1, new)

    assert_slots(layout, write(shared), [members[0], new])


def test_typed_keys_are_params_like_others():
    keys = jax.random.split(jax.random.key(0), 3)
    specs, data = [_tree.spec_of(keys[0])], jax.random.key_data
    layout = single(specs, 4)
    bank = _bank.pack(layout, [[[keys[0]], [keys[1]]]])
    bank = _bank.write(layout, bank, 0, 1, [keys[2]])
    for slot, key in enumerate((keys[0], keys[2])):
        (found,) = _bank.read(layout, bank, 0, slot)
        np.testing.assert_array_equal(data(found), data(key))
    (shared,) = _bank.pack(single(specs, 2), [[[keys[0]], [keys[0]]]]).stacks
    assert shared.shape == ()
    columns = [[[keys[0]], [keys[1]]]]
    (traced,) = jax.jit(lambda: _bank.pack(layout, columns))().stacks
    np.testing.assert_array_equal(data(traced[:2]), data(keys[:2]))


@given(st.integers(1, 1000))
def test_a_capacity_is_the_next_power_of_two(num_jobs):
    capacity = next_power_of_two(num_jobs)
    assert capacity & (capacity - 1) == 0
    assert capacity / 2 < num_jobs <= capacity


@st.composite
def unlike(draw):
    """Draw a layout of two species, jobs of each, and a slot with new leaves.

    Leaf 0 of both, and leaf 1, stand in one array; leaf 2 is the first one's alone.
    """
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(3)]
    sizes = st.tuples(st.integers(0, 3), st.integers(1, 3))
    shapes = [[draw(sizes) for _ in range(3)], [draw(sizes) for _ in range(2)]]
    if draw(st.booleans()):
        shapes[1][0] = shapes[0][0]  # then the two may share it
    kinds = [list(zip(own, dtypes, strict=False)) for own in shapes]
    specs = [[jax.ShapeDtypeStruct(*kind) for kind in own] for own in kinds]

    def drawn_leaves(b):
        return [draw_leaf(*kind, draw(st.integers(0, 1))) for kind in kinds[b]]

    columns = [
        [drawn_leaves(b) for _ in range(draw(st.integers(1, 3)))] for b in range(2)
    ]
    capacities = [len(column) + draw(st.integers(0, 2)) for column in columns]
    joint = [([(0, leaf), (1, leaf)], [own[leaf] for own in specs]) for leaf in (0, 1)]
    layout = layout_of(capacities, *joint, ([(0, 2)], [specs[0][2]]))
    b = draw(st.integers(0, 1))
    slot = draw(st.integers(0, capacities[b] - 1))
    return layout, columns, (b, slot, drawn_leaves(b))


def assert_bank(layout, bank, columns):
    """Check all slots of all banks; what is padding is zero."""
    for b, members in enumerate(columns):
        assert_slots(layout, bank, members, b)
    for stack, buffer in zip(bank.stacks, layout.params, strict=True):
        if _bank.is_stacked(stack, buffer):
            padding, at = np.array(stack), 0
            for (b, _), shape in zip(buffer.members, buffer.shapes, strict=True):
                own = slice(at, at := at + layout.capacities[b])
                padding[(own, *map(slice, shape))] = 0
            assert at == len(padding) and not padding.any()


@given(unlike())
def test_leaves_of_two_species_stand_in_one_array_padded_with_zeros(drawn):
    layout, columns, _ = drawn
    bank = _bank.pack(layout, columns)
    assert_bank(layout, bank, columns)
    for stack, buffer in zip(bank.stacks, layout.params, strict=True):
        rows = sum(layout.capacities[b] for b, _ in buffer.members)
        if _bank.is_stacked(stack, buffer):
            assert stack.shape == (rows, *np.max(buffer.shapes, axis=0))
            at = 0
            for b, _ in buffer.members:  # slots that no job has are zero
                unused = slice(at + len(columns[b]), at := at + layout.capacities[b])
                assert not np.asarray(stack)[unused].any()
        else:
            assert stack.shape == buffer.shapes[0] and len(set(buffer.shapes)) == 1


@given(unlike())
def test_a_write_changes_one_slot_of_one_species(drawn):
    layout, columns, (b, slot, new) = drawn
    before = _bank.unshare(layout, _bank.pack(layout, columns), b, new)
    after = _bank.write(layout, before, b, slot, new)
    assert_bank(layout, before, columns)
    assert_bitwise(read(layout, after, b, slot), new)
    for other, capacity in enumerate(layout.capacities):
        for k in set(range(capacity)) - ({slot} if other == b else set()):
            assert_bitwise(
                read(layout, after, other, k), read(layout, before, other, k)
            )
    if slot < len(columns[b]):
        written = [list(members) for members in columns]
        written[b][slot] = new
        assert_bank(layout, after, written)
        back = _bank.write(layout, after, b, slot, columns[b][slot])
        assert_bitwise(back, before)


@given(unlike())
def test_unshare_makes_room_for_one_species_and_changes_no_slot_of_either(drawn):
    layout, columns, (b, _, new) = drawn
    bank = _bank.pack(layout, columns)
    wider = _bank.unshare(layout, bank, b, new)
    assert_bank(layout, wider, columns)
    assert _bank.fits_shared(layout, wider, b, new)
    for i, buffer in enumerate(layout.params):
        is_kept = wider.stacks[i] is bank.stacks[i]
        own = [leaf for other, leaf in buffer.members if other == b]
        is_equal = not own or all(
            np.array_equal(new[own[0]], leaves[own[0]]) for leaves in columns[b]
        )
        was_shared = not _bank.is_stacked(bank.stacks[i], buffer)
        if not was_shared or is_equal or layout.rows_of(i) == 1:
            assert is_kept
        else:
            assert wider.stacks[i].shape[0] == layout.rows_of(i)


@given(unlike())
def test_what_is_marked_alike_is_kept_once(drawn):
    layout, columns, _ = drawn
    marks = _bank.marks(columns, layout.capacities, range(len(columns)))
    stacks = _bank.pack(layout, columns).stacks
    for i, buffer in enumerate(layout.params):
        found = {marks[b][leaf] for b, leaf in buffer.members}
        if len(found) == 1 and None not in found:
            assert not _bank.is_stacked(stacks[i], buffer)


def test_marks_say_which_leaves_all_slots_share_and_what_they_are():
    zeros = np.zeros(3)
    columns = [
        [[A, A, zeros, A], [A.copy(), A + 1, zeros.copy(), A.astype("f")]],
        [[A.copy(), A + 1, zeros], [A.copy(), A + 1, zeros]],
    ]
    first, (other, next_one, purpose) = _bank.marks(columns, [2, 2], [0, 1])
    same, differs, accident, cast = first
    assert same is not None and same == other
    assert differs is None and accident is None and cast is None
    assert next_one is not None and next_one != same
    assert purpose is not None and purpose not in (same, next_one)


def test_marks_of_a_lone_slot_take_the_same_object():
    twin = A.copy()
    assert _bank.marks([[[A]], [[twin]]], [1, 1], [0, 1]) == [[None], [None]]
    columns = [[[A]], [[A]], [[A], [twin]]]
    (one,), (other,), (third,) = _bank.marks(columns, [1, 1, 2], [0, 1, 2])
    assert one is not None and one == other == third
    assert _bank.marks([[[A, A]]], [1], [0]) == [[None, None]]
    # Programs of one job hold the same objects: that is not sharing.
    assert _bank.marks([[[A]]] * 2, [1, 1], [0, 0]) == [[None]] * 2
    assert [None] not in _bank.marks([[[A]]] * 3, [1] * 3, [0, 0, 1])
    # Room for more jobs: they are expected to bring their own.
    assert _bank.marks([[[A]]], [2], [0]) == [[None]]


def test_marks_take_specs_for_values_and_equal_only_themselves():
    spec, twin = (jax.ShapeDtypeStruct((3,), "f4") for _ in range(2))
    columns = [[[spec], [spec]], [[spec], [spec]], [[spec], [twin]]]
    marks = _bank.marks(columns, [2] * 3, [0, 1, 2])
    assert marks[0] == marks[1] != [None]
    assert marks[2] == [None]


def test_programs_of_the_same_leaves_of_the_same_jobs_have_one_bank():
    other = A.copy()
    jobs = [["a", "b"], ["a", "b"], ["a", "c"], ["a", "b"], ["c"]]
    columns = [[[A], [A]], [[A], [A]], [[A], [A]], [[A], [other]], [[]]]
    assert _bank.alias(jobs, columns) == (0, 0, 1, 2, 3)
