"""Elementwise launches: padding stays where it is."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.merging import check, share

SHAPES = [(3, 5), (1, 5), (4, 2), (3, 1), (7, 7)]


def drawn(shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype("f")


@pytest.mark.parametrize("name, fn", [("tanh", jnp.tanh), ("neg", lax.neg)])
def test_a_unary_op_of_any_sizes(name, fn):
    check(name, [(fn, (drawn(s),)) for s in SHAPES])


def test_a_binary_op_of_any_sizes():
    check("add", [(lax.add, (drawn(s), drawn(s, 1))) for s in SHAPES])


def test_scalars_that_differ():
    members = [(lambda x, c=c: lax.mul(x, c), (drawn((c, 2)),)) for c in (1, 2, 3)]
    check("mul", [(lambda x, y: lax.mul(x, y), (drawn((2, 3)), drawn((2, 3))))] * 2)
    assert len(members) == 3


def test_no_sharing_where_one_member_broadcasts_and_another_does_not():
    one, other = drawn((3, 1)), drawn((3, 5))
    add = lambda x, y: lax.add_p.bind(x, y)  # noqa: E731
    assert not share("add", [(add, (other, one)), (add, (other, other))])
    check("add", [(add, (other, one)), (add, (drawn((2, 4)), drawn((2, 1))))])


def test_conversions_share_by_type():
    to_int = lambda x: x.astype(jnp.int32)  # noqa: E731
    to_half = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    x = np.arange(6, dtype="f").reshape(2, 3)
    check("convert_element_type", [(to_int, (x,)), (to_int, (x[:1],))])
    assert not share("convert_element_type", [(to_int, (x,)), (to_half, (x,))])
