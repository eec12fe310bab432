"""Moves by index: members whose shapes put their elements in unlike places."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from tests.merging import check, share


def drawn(*shape):
    return np.arange(1, 1 + math.prod(shape), dtype=np.float32).reshape(shape)


def reshapes(*pairs):
    return [(lambda x, t=to: lax.reshape(x, t), (drawn(*of),)) for of, to in pairs]


def splits(axis, *members):
    return [
        (lambda x, s=sizes: tuple(lax.split_p.bind(x, sizes=s, axis=axis)), (x,))
        for sizes, x in members
    ]


def slices(*members):
    return [
        (lambda x, a=start, b=limit, s=strides: lax.slice(x, a, b, s), (drawn(*shape),))
        for shape, start, limit, strides in members
    ]


@pytest.mark.parametrize(
    "pairs",
    [
        [((384,), (12, 32)), ((384,), (6, 64))],  # heads of two widths
        [((12,), (3, 4)), ((10,), (5, 2)), ((6,), (2, 3))],
        [((3, 4), (12,)), ((5, 2), (10,))],  # and back
        [((2, 3, 5), (6, 5)), ((2, 4, 5), (8, 5))],  # other lengths below
        [((7, 12), (7, 3, 4)), ((3, 6), (3, 2, 3))],  # an axis before
        [((6, 5), (2, 3, 5)), ((8, 2), (2, 4, 2))],  # an axis behind
        [((4, 12), (4, 2, 6)), ((2, 6), (2, 3, 2)), ((5, 35), (5, 5, 7))],
        [((4, 6, 6), (2, 2, 6, 2, 3)), ((9, 2, 10), (3, 3, 2, 5, 2))],  # two runs
        [((12,), (2, 3, 2)), ((30,), (3, 5, 2))],
        [((1, 3, 5), (3, 5)), ((2, 3, 5), (6, 5))],  # a run that begins with one
    ],
)
def test_reshapes_of_unlike_runs(pairs):
    check("reshape", reshapes(*pairs))


def test_ones_and_other_runs_stay_apart():
    assert not share("reshape", reshapes(((3, 5), (15,)), ((3, 5), (3, 5, 1))))
    assert not share("reshape", reshapes(((2, 6), (12,)), ((2, 6), (3, 4))))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_splits_of_unlike_sizes(axis):
    def of(*sizes):
        shape = [2, 3, 2]
        shape[axis] = sum(sizes)
        return sizes, drawn(*shape)

    check("split", splits(axis, of(2, 2, 2), of(3, 3, 3), of(1, 1, 5)))


def test_splits_of_other_numbers_stay_apart():
    members = splits(0, ((2, 2), drawn(4))) + splits(0, ((2, 1, 1), drawn(4)))
    assert not share("split", members)


def test_slices_that_start_elsewhere():
    check("slice", slices(((9,), (3,), (6,), None), ((20,), (8,), (16,), None)))
    check(
        "slice",
        slices(
            ((5, 9), (1, 3), (4, 9), (1, 2)),
            ((7, 4), (0, 0), (7, 4), (1, 2)),
            ((2, 12), (1, 11), (2, 12), (1, 2)),
        ),
    )


def test_slices_of_nothing():
    check("slice", slices(((5,), (3,), (3,), None), ((9,), (1,), (4,), None)))


def test_what_a_row_does_not_own_it_never_shows():
    """NaN of one member stays with it."""
    bad = drawn(12)
    bad[5] = np.nan
    fold = [(lambda x, t=to: lax.reshape(x, t), (x,)) for x, to in ((bad, (3, 4)),)]
    check("reshape", fold + reshapes(((10,), (5, 2))))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reshapes_of_any_runs(data):
    below = st.integers(2, 5)
    pairs = []
    for _ in range(data.draw(st.integers(2, 3))):
        rows, heads, width = (data.draw(below) for _ in range(3))
        pairs.append(((rows, heads * width), (rows, heads, width)))
    if data.draw(st.booleans()):
        pairs = [(to, of) for of, to in pairs]
    members = reshapes(*pairs)
    if share("reshape", members):  # equal rows and features may fall in other runs
        check("reshape", members)
