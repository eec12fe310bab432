"""Texts about trees, and what counts as equal."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stfuse import _tree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=[]
)
@dataclasses.dataclass
class Node:
    leaf: object


def test_a_path_reads_like_one_of_a_file():
    tree = {"params": [{"kernel": 1.0}, Node(2.0)], "x": (3.0,)}
    paths = [path for path, _ in _tree.leaves_with_paths(tree)]
    assert paths == ["params/0/kernel", "params/1/leaf", "x/0"]
    assert _tree.leaves_with_paths(5.0) == [("", 5.0)]


DESCRIBED = {
    "float32[2,3]": np.zeros((2, 3), "f"),
    "bfloat16[]": jnp.zeros((), jnp.bfloat16),
    "int8[0]": jax.ShapeDtypeStruct((0,), np.int8),
    "bool[]": True,
    "float[]": 1.5,
    "int[]": 2**31 - 1,
    "int of too many bits": 2**31,
    "key<fry>[]": jax.random.key(0),
    "str": "abc",
    "NoneType": None,
    "ndarray": np.array(["abc"]),
}


@pytest.mark.parametrize("text", DESCRIBED)
def test_a_leaf_is_described_by_dtype_and_shape_or_by_its_type(text):
    assert _tree.describe(DESCRIBED[text]) == text


def test_a_spec_is_what_jax_makes_of_a_leaf():
    for leaf in (1.5, 2, True, 1j, np.float64(1), np.arange(3), np.zeros(2, "f2")):
        spec, array = _tree.spec_of(leaf), jnp.asarray(leaf)
        assert (spec.shape, spec.dtype) == (array.shape, array.dtype)


ARRAYS = st.tuples(
    st.sampled_from(["f4", "f8", "i4", "u1", "?", ml_dtypes.bfloat16]),
    st.sampled_from([(), (2,), (2, 2), (0, 3)]),
    st.integers(0, 1),
)


def array_of(drawn):
    dtype, shape, seed = drawn
    return np.random.default_rng(seed).integers(0, 99, shape).astype(dtype)


@given(ARRAYS, ARRAYS)
def test_leaves_are_the_same_when_shape_dtype_and_bytes_are(a, b):
    x, y = array_of(a), array_of(b)
    expected = (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
    assert _tree.same_bytes(x, y) == _tree.same_bytes(y, x) == expected
    assert _tree.same_bytes(x, np.asarray(x).copy())


def test_bytes_and_not_values_are_compared():
    nan = np.array([np.nan])
    assert _tree.same_bytes(nan, nan.copy())
    assert not _tree.same_bytes(np.array([0.0]), np.array([-0.0]))
    one, other = jax.random.key(0), jax.random.key(1)
    assert _tree.same_bytes(one, jax.random.key(0))
    assert not _tree.same_bytes(one, other)
    known = jax.jit(lambda: [_tree.same_bytes(one, key) for key in (one, other)])()
    assert known == [True, False]


ONE_VALUE = {"zeros": np.zeros(3), "a number": 2.5, "ones": jnp.ones((2, 2))}
MANY_VALUES = {"a range": np.arange(3), "nothing": np.zeros(0), "nan": [np.nan] * 2}


@pytest.mark.parametrize("leaf", ONE_VALUE.values(), ids=ONE_VALUE)
def test_a_leaf_that_repeats_one_value_is_known(leaf):
    assert _tree.is_one_value(leaf)


@pytest.mark.parametrize("leaf", MANY_VALUES.values(), ids=MANY_VALUES)
def test_a_leaf_of_several_values_or_none_is_not_one_value(leaf):
    assert not _tree.is_one_value(np.asarray(leaf))


TREE = {"a": np.zeros((2, 3), "f"), "b": (np.zeros(2, "i4"), 1.0)}
DIFFERENCES = {
    "leaf 'b/1' is missing": {"a": TREE["a"], "b": (TREE["b"][0],)},
    "leaf 'c' is not expected": {**TREE, "c": 1},
    "leaf 'a' is float32[3,2]; expected float32[2,3]": {**TREE, "a": TREE["a"].T},
    "leaf 'a' is int32[2,3]; expected float32[2,3]": {
        **TREE,
        "a": np.zeros((2, 3), "i4"),
    },
    "leaf 'a' is a str; expected float32[2,3]": {**TREE, "a": "abc"},
    "leaf 'b/1' is int32[]; expected float32[]": {**TREE, "b": (TREE["b"][0], 2)},
    "structure is PyTreeDef({'a': *, 'b': [*, *]}); "
    "expected PyTreeDef({'a': *, 'b': (*, *)})": {**TREE, "b": list(TREE["b"])},
}


@pytest.mark.parametrize("text", DIFFERENCES)
def test_the_first_difference_is_told(text):
    assert _tree.first_difference(TREE, DIFFERENCES[text]) == text


def test_trees_of_equal_shapes_and_dtypes_do_not_differ():
    specs = jax.tree.map(_tree.spec_of, TREE)
    wide = {**TREE, "a": np.ones((2, 3))}  # float64, which JAX makes float32
    for found in (TREE, specs, wide, jax.tree.map(jnp.asarray, TREE)):
        assert _tree.first_difference(TREE, found) is None
        assert _tree.first_difference(found, TREE) is None
