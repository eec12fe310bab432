"""Leaf-wise views of pytrees: paths, specs, comparison, and texts about them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core


def path_str(path: tuple[Any, ...]) -> str:
    """Return a readable leaf path such as ``params/dense/kernel``."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
    )


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """Return ``(path, leaf)`` pairs in leaf order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(path_str(path), leaf) for path, leaf in flat]


def path_of(tree: Any, i: int) -> str:
    """Return the path of a tree's leaf number ``i``, for an error: it takes a while."""
    return leaves_with_paths(tree)[i][0]


def is_spec(leaf: Any) -> bool:
    """Return whether a leaf is a shape without values."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def is_arraylike(leaf: Any) -> bool:
    """Return whether a leaf is an array, a spec, or a Python or NumPy number."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMm" and leaf.dtype.names is None
    if type(leaf) is int:  # as JAX has them: of 32 bits, unless told otherwise
        limits = np.iinfo(jax.dtypes.canonicalize_dtype(np.int64))
        return limits.min <= leaf <= limits.max
    return is_spec(leaf) or isinstance(leaf, jax.Array | bool | float | complex)


def is_tracer(leaf: Any) -> bool:
    """Return whether a leaf is a value of a function being traced."""
    return isinstance(leaf, core.Tracer)


def is_typed_key(leaf: Any) -> bool:
    """Return whether a leaf has a JAX PRNG key dtype, which NumPy cannot hold."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or isinstance(dtype, np.dtype):  # the usual case, in no time
        return False
    return jnp.issubdtype(dtype, jax.dtypes.extended)


def spec_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return a leaf's shape and the dtype that JAX gives it."""
    if is_typed_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
    return jax.ShapeDtypeStruct(
        np.shape(leaf), jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
    )


def describe(leaf: Any) -> str:
    """Return a leaf as ``float32[8,3]``, or its type when it is no array."""
    if not is_arraylike(leaf):
        is_large = type(leaf) is int
        return f"{type(leaf).__name__}{' of too many bits' if is_large else ''}"
    shape = ",".join(map(str, np.shape(leaf)))
    return f"{leaf.dtype if hasattr(leaf, 'dtype') else type(leaf).__name__}[{shape}]"


def same_bytes(a: Any, b: Any) -> bool:
    """Return whether two leaves hold the same bytes (equal NaNs are equal)."""
    if a is b:
        return True
    if is_typed_key(a):
        with jax.ensure_compile_time_eval():  # known, though others are traced
            a, b = jax.random.key_data(a), jax.random.key_data(b)
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    return bool(np.array_equal(x.reshape(-1).view("u1"), y.reshape(-1).view("u1")))


def is_one_value(leaf: Any) -> bool:
    """Return whether a leaf repeats one value: a fresh bias, scale or adapter."""
    if is_typed_key(leaf):
        return False
    x = np.asarray(leaf).reshape(-1)
    return x.size > 0 and bool((x == x[0]).all())


def first_difference(expected: Any, found: Any) -> str | None:
    """Return a text on the first leaf whose path, shape or dtype differs.

    Args:
        expected: pytree of arrays or specs.
        found: pytree to compare with it.

    Returns:
        None when structure, shapes and (JAX) dtypes agree.
    """
    if jax.tree.structure(expected) != jax.tree.structure(found):
        want, have = ({p for p, _ in leaves_with_paths(x)} for x in (expected, found))
        for path in sorted(want - have):
            return f"leaf '{path}' is missing"
        for path in sorted(have - want):
            return f"leaf '{path}' is not expected"
        return (
            f"structure is {jax.tree.structure(found)}; "
            f"expected {jax.tree.structure(expected)}"
        )
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
    for i, (x, y) in enumerate(pairs):
        if x is y:
            continue
        if not is_arraylike(y):
            path = path_of(found, i)
            return f"leaf '{path}' is a {describe(y)}; expected {describe(x)}"
        a, b = spec_of(x), spec_of(y)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            path = path_of(found, i)
            return f"leaf '{path}' is {describe(b)}; expected {describe(a)}"
    return None
