"""Shape launches: places chosen by shapes, with padding at every end."""

import itertools
import math
from collections import defaultdict
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from stfuse import _rules
from stfuse._rules import Merge, _shape
from tests import merging
from tests.merging import compute, merged, op_of, share, stack_of


def drawn(*shape, seed=0, dtype="f"):
    """Values with a NaN and an infinity among them, if floating."""
    rng = np.random.default_rng([seed, *shape])
    if dtype != "f":
        return rng.integers(0, 99, shape).astype(dtype)
    x = rng.normal(size=shape).astype("f")
    x.reshape(-1)[:1] = np.nan
    x.reshape(-1)[-1:] = np.inf
    return x


def check(name, members):
    merging.check(name, members, fills=("even", "odd"), is_compiled=True)


def check_one(name, members, data):
    fill = data.draw(st.sampled_from([None, 0, "even", "odd"]))
    merging.check(name, members, fills=[fill], is_compiled=True)


def of(fn, *shapes):
    """Members that apply one function to one array each."""
    return [(fn, (drawn(*s),)) for s in shapes]


def bound(primitive, own_shape, **params):
    """A member that binds a primitive to one array."""
    return partial(primitive.bind, **params), (drawn(*own_shape),)


def clean_axes(name, members, fill=0):
    return merged(name, members, fill)[1][0].clean


def reshapes(*pairs):
    rest = {"dimensions": None, "sharding": None}
    return [bound(lax.reshape_p, s, new_sizes=to, **rest) for s, to in pairs]


# Reshape


@pytest.mark.parametrize(
    "pairs",
    [
        [((384,), (12, 32)), ((192,), (6, 32)), ((64,), (2, 32))],
        [((12, 32), (384,)), ((2, 32), (64,))],
        [((5, 3, 8), (5, 3, 2, 4)), ((1, 7, 40), (1, 7, 10, 4))],
        [((2, 3, 5), (6, 5)), ((7, 3, 1), (21, 1)), ((4, 3, 9), (12, 9))],
        [((6, 5), (2, 3, 5)), ((21, 2), (7, 3, 2))],
        [((2, 5, 3, 7), (2, 15, 7)), ((4, 2, 3, 1), (4, 6, 1))],
        [((1, 3, 5), (3, 5)), ((1, 7, 2), (7, 2))],
        [((3, 5), (3, 1, 5)), ((4, 2), (4, 1, 2))],
        [((3, 5), (3, 5, 1)), ((4, 2), (4, 2, 1))],
        [((1, 1), ()), ((1, 1), ())],
        [((4, 6), (8, 3)), ((2, 6), (4, 3)), ((10, 6), (20, 3))],
        [((4, 4, 3), (48,)), ((9, 4, 3), (108,))],
    ],
)
def test_reshapes_that_share(pairs):
    check("reshape", reshapes(*pairs))


def test_a_reshape_keeps_a_clean_leading_axis():
    flat = reshapes(((2, 3, 5), (6, 5)), ((7, 3, 2), (21, 2)))
    assert clean_axes("reshape", flat) == (True, True)
    assert clean_axes("reshape", flat, "odd") == (False, False)
    assert clean_axes("reshape", flat, "even") == (True, True)
    assert clean_axes("reshape", flat, None) == (False, False)


def test_any_small_reshapes_of_one_form_are_exact():
    """All that may share a launch, in one launch; also those that need no index."""
    shapes = [s for n in (1, 2, 3) for s in itertools.product((1, 2, 3, 4), repeat=n)]
    groups = defaultdict(list)
    for pair in itertools.permutations(shapes, 2):
        if math.prod(pair[0]) == math.prod(pair[1]):
            op = op_of("reshape", *reshapes(pair)[0])
            groups[_rules.form(op)].append(op)
            groups[_shape._reshape_form(op)].append(op)
    groups = [tuple(ops) for ops in groups.values() if len(ops) > 1]
    assert len(groups) > 50
    for ops in groups:
        wide, xs = _rules.widen(ops), [drawn(*op.in_specs[0].shape) for op in ops]
        merge = Merge(ops, (1,) * len(ops), wide, compute)
        (y,) = _rules.launch(merge, [stack_of(wide, 0, xs, np.nan)])
        for row, x, op in zip(np.asarray(y.array), xs, ops, strict=True):
            own = row[tuple(map(slice, op.specs[0].shape))]
            np.testing.assert_array_equal(own, x.reshape(op.specs[0].shape))


@given(st.data())
def test_runs_of_any_leading_sizes_share(data):
    below = st.lists(st.sampled_from([1, 2, 3]), max_size=2)
    runs = data.draw(st.lists(st.tuples(below, below), min_size=1, max_size=2))
    pairs = []
    for _ in range(2):
        ins, outs = (), ()
        for a, b in runs:
            lead = data.draw(st.integers(2, 4))
            ins += (lead * math.prod(b), *a)
            outs += (lead * math.prod(a), *b)
        pairs.append((ins, outs))
    if all(ins != outs for ins, outs in pairs):
        check_one("reshape", reshapes(*pairs), data)


# Axes that move, come or go


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_transposes(order):
    shapes = [(3, 5, 2), (1, 7, 2), (4, 1, 6)]
    members = [bound(lax.transpose_p, s, permutation=order) for s in shapes]
    check("transpose", members)
    assert clean_axes("transpose", members, "odd") == tuple(a == 1 for a in order)


@pytest.mark.parametrize("dtype", ["i4", "?", "u1", "f2", jnp.bfloat16])
def test_any_dtype_moves(dtype):
    xs = [drawn(3, 5, dtype=dtype), drawn(4, 2, dtype=dtype)]
    pad = lambda x, v: lax.pad(x, v, [(1, 2, 1)] * 2)  # noqa: E731
    check("transpose", [(jnp.transpose, (x,)) for x in xs])
    check("pad", [(pad, (x, x[0, 0])) for x in xs])


def test_squeezes():
    members = of(lambda x: lax.squeeze(x, (0, 2)), (1, 3, 1, 5), (1, 7, 1, 2))
    check("squeeze", members)
    assert clean_axes("squeeze", members, "odd") == (True, True)


def broadcasts(axes, *pairs):
    rest = {"broadcast_dimensions": axes, "sharding": None}
    return [bound(lax.broadcast_in_dim_p, s, shape=to, **rest) for s, to in pairs]


@pytest.mark.parametrize(
    "axes, pairs",
    [
        ((), [((), (3, 5)), ((), (7, 1))]),
        ((1,), [((5,), (3, 5)), ((2,), (7, 2)), ((1,), (2, 1))]),
        ((0,), [((5,), (5, 3)), ((2,), (2, 7))]),
        ((0, 2), [((3, 5), (3, 2, 5)), ((4, 1), (4, 6, 1))]),
        ((0, 1), [((3, 1), (3, 5)), ((4, 1), (4, 2))]),
        ((1, 2), [((1, 5), (1, 4, 5)), ((1, 3), (2, 6, 3))]),
    ],
)
def test_broadcasts(axes, pairs):
    check("broadcast_in_dim", broadcasts(axes, *pairs))


def test_copies_in_padding_are_dirty_unless_they_are_zero():
    members = broadcasts((1,), ((5,), (3, 5)), ((2,), (7, 2)))
    assert clean_axes("broadcast_in_dim", members) == (False, True)

    def literal(value):
        fill = np.float32(value)
        add = lambda x: x + lax.broadcast_in_dim(fill, x.shape, ())  # noqa: E731
        return of(add, (2, 2), (5, 2))

    assert clean_axes("broadcast_in_dim", literal(0)) == (True, True)
    assert clean_axes("broadcast_in_dim", literal(-0.0), None) == (False, False)
    assert clean_axes("broadcast_in_dim", literal(1)) == (False, False)
    check("broadcast_in_dim", literal(0))


def test_reversal_of_an_axis_of_one_size():
    back = lambda x: lax.rev(x, (1,))  # noqa: E731
    check("rev", of(back, (3, 5, 2), (1, 5, 7)))
    assert clean_axes("rev", of(back, (3, 2), (1, 2)), "odd") == (False, True)


def iotas(axis, *shapes):
    return [(partial(lax.broadcasted_iota, np.int32, s, axis), ()) for s in shapes]


def test_iota_is_one_array_for_all():
    members = iotas(1, (3, 5), (1, 7), (4, 1))
    check("iota", members)
    assert not merged("iota", members, 0)[1][0].is_stacked


@pytest.mark.parametrize("reps", [[(2, 1), (2, 1)], [(3, 1), (2, 1)], [(2, 1), (0, 1)]])
def test_tiles(reps):
    sizes = zip(reps, (5, 2), strict=True)
    members = [bound(lax.tile_p, (3, n), reps=r) for r, n in sizes]
    check("tile", members)
    assert clean_axes("tile", members) == (False, True)


# Pieces


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lasts", [(3, 7, 1), (4, 4, 2), (5, 1, 5)])
def test_concatenations_whose_last_piece_differs(axis, lasts):
    join = lambda *xs: lax.concatenate(xs, axis)  # noqa: E731
    members = []
    for other, last in zip((3, 1, 5), lasts, strict=True):
        shape = [other, other + 1]
        pieces = [drawn(*shape[:axis], n, *shape[axis:]) for n in (2, 1, last)]
        members.append((join, tuple(pieces)))
    check("concatenate", members)
    assert clean_axes("concatenate", members) == (True, True, True)


@pytest.mark.parametrize("axis", [0, 1])
def test_splits_whose_last_piece_differs(axis):
    def member(last, other):
        shape = [other, other]
        shape[axis] = 3 + last
        return bound(lax.split_p, shape, sizes=(2, 1, last), axis=axis)

    members = [member(*m) for m in ((4, 3), (1, 5), (7, 2))]
    check("split", members)
    stacks = merged("split", members, "odd")[1]
    assert all(s.clean == (False, True) for s in stacks)


def slices(starts, strides, *pairs):
    return [
        (lambda x, to=to: lax.slice(x, starts, to, strides), (drawn(*shape),))
        for shape, to in pairs
    ]


@pytest.mark.parametrize(
    "starts, strides, pairs",
    [
        ((0, 0), None, [((3, 5), (2, 5)), ((7, 2), (7, 1))]),
        ((1, 0), None, [((3, 5), (2, 5)), ((7, 2), (7, 1)), ((2, 2), (2, 1))]),
        ((1, 2), (2, 3), [((3, 9), (3, 8)), ((8, 4), (7, 3))]),
        ((0,), (1,), [((5,), (5,)), ((9,), (4,))]),
    ],
)
def test_slices(starts, strides, pairs):
    check("slice", slices(starts, strides, *pairs))


def test_a_slice_that_ends_early_shows_true_data():
    def is_clean(*limits):
        pairs = zip(((5,), (3,)), limits, strict=True)
        return clean_axes("slice", slices((1,), None, *pairs)) == (True,)

    assert is_clean((5,), (3,))
    assert not is_clean((5,), (2,))
    assert is_clean((2,), (2,))


def pads(value, *pairs):
    return [
        (lambda x, v, c=config: lax.pad(x, v, c), (drawn(*shape), np.float32(value)))
        for shape, config in pairs
    ]


@pytest.mark.parametrize("value", [0.0, -np.inf])
@pytest.mark.parametrize(
    "pairs",
    [
        [((3, 5), [(1, 2, 0), (0, 0, 0)]), ((6, 1), [(1, 0, 0), (0, 3, 0)])],
        [((3,), [(2, -1, 0)]), ((7,), [(2, -3, 0)]), ((1,), [(2, 9, 0)])],
        [((3,), [(-1, 1, 0)]), ((7,), [(-1, -1, 0)]), ((1,), [(-1, 4, 0)])],
        [((3,), [(1, 1, 2)]), ((7,), [(1, -2, 2)]), ((1,), [(1, 0, 2)])],
        [((5,), [(-2, 3, 1)]), ((2,), [(-2, 3, 1)])],
    ],
)
def test_pads(value, pairs):
    check("pad", pads(value, *pairs))


def test_pads_with_values_of_their_own():
    config = [(1, 2, 0), (0, 1, 0)]
    check("pad", pads(3.0, ((3, 5), config)) + pads(np.nan, ((6, 1), config)))


def test_a_pad_of_literal_zeros_is_clean_where_nothing_is_cut():
    def member(n, high):
        zero = np.float32(0)
        return lambda x: lax.pad(x, zero, [(1, high, 0), (1, 0, 0)]), (drawn(n, n),)

    grown, cut = [member(3, 2), member(7, 1)], [member(3, 0), member(7, -5)]
    check("pad", grown)
    check("pad", cut)
    assert clean_axes("pad", grown) == (True, True)
    assert clean_axes("pad", grown, "odd") == (True, True)  # masked on the way
    assert clean_axes("pad", grown, None) == (True, False)
    assert clean_axes("pad", cut) == (False, True)


def joined(*sizes):
    pieces = tuple(drawn(n, 3) for n in sizes)
    return lambda *xs: lax.concatenate(xs, 0), pieces


TURNS = ((0, 1), (1, 0))
ZEROS = pads(0, ((3,), [(1, 0, 0)]))
APART = [
    # a one elsewhere, other runs, no data; unlike places in equal runs share by index
    ("reshape", reshapes(((3, 5), (1, 3, 5)), ((3, 5), (3, 1, 5)))),
    ("reshape", reshapes(((2, 3, 4), (6, 4)), ((2, 3, 4), (2, 12)))),
    ("reshape", reshapes(((0, 3), (3, 0)), ((2, 3), (3, 2)))),
    ("transpose", [bound(lax.transpose_p, (3, 3), permutation=p) for p in TURNS]),
    ("squeeze", [bound(lax.squeeze_p, (1, 1), dimensions=(a,)) for a in (0, 1)]),
    # an axis that one repeats, another has or has once
    ("broadcast_in_dim", broadcasts((0,), ((1,), (5, 2)), ((5,), (5, 2)))),
    ("broadcast_in_dim", broadcasts((0,), ((1,), (5, 2)), ((1,), (1, 2)))),
    ("broadcast_in_dim", [broadcasts((a,), ((2,), (2, 2)))[0] for a in (0, 1)]),
    ("rev", [bound(lax.rev_p, (n, 2), dimensions=(0,)) for n in (3, 4)]),
    ("rev", [bound(lax.rev_p, (3, 3), dimensions=(a,)) for a in (0, 1)]),
    ("iota", [iotas(a, (3, 3))[0] for a in (0, 1)]),
    ("tile", [bound(lax.tile_p, (n, 2), reps=(2, 1)) for n in (3, 4)]),
    ("concatenate", [joined(2, 4), joined(3, 4)]),
    ("concatenate", [joined(2, 4), joined(2, 2, 2)]),
    ("split", [bound(lax.split_p, (6,), sizes=s, axis=0) for s in ((6,), (3, 3))]),
    ("slice", [slices((0,), (b,), ((5,), (4,)))[0] for b in (1, 2)]),
    ("pad", ZEROS + pads(0, ((3,), [(0, 1, 0)]))),
    ("pad", ZEROS + pads(0, ((3,), [(1, 0, 1)]))),
]


@pytest.mark.parametrize("name, members", APART)
def test_what_moves_an_end_does_not_share(name, members):
    assert not share(name, members)


SIZES = st.sampled_from([3, 5, 8])


def shapes_of_one_rank(least=1):
    return st.integers(least, 2).flatmap(
        lambda n: st.lists(st.tuples(*[SIZES] * n), min_size=2, max_size=3)
    )


@given(st.data())
def test_pads_of_any_sizes(data):
    low, gap = data.draw(st.integers(-2, 2)), data.draw(st.integers(0, 2))
    highs, pairs = st.sampled_from([-1 - min(low, 0), -1, 0, 3]), []
    for shape in data.draw(shapes_of_one_rank()):
        pairs.append((shape, [(low, data.draw(highs), gap) for _ in shape]))
    check_one("pad", pads(data.draw(st.sampled_from([0, 2])), *pairs), data)


@given(st.data())
def test_slices_of_any_sizes(data):
    start, stride = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3))
    shapes = data.draw(shapes_of_one_rank())
    pairs = [(s, [data.draw(st.integers(start, n)) for n in s]) for s in shapes]
    starts, strides = ([v] * len(shapes[0]) for v in (start, stride))
    check_one("slice", slices(starts, strides, *pairs), data)


@given(st.data())
def test_concatenations_of_any_sizes(data):
    axis, first = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 3))
    members = []
    for shape in data.draw(shapes_of_one_rank(2)):
        head = [*shape]
        head[axis] = first
        pieces = (drawn(*head), drawn(*shape, seed=1))
        members.append((lambda *xs: lax.concatenate(xs, axis), pieces))
    check_one("concatenate", members, data)
