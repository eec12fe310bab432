"""Launches of reductions, scans, orders and windows: padding is never reduced."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.merging import check, merged, share

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SHAPES = [(3, 5, 4), (1, 1, 1), (7, 2, 11)]
quick = hypothesis.settings(max_examples=12, deadline=None, database=None)

FLOATS = ("float32", "bfloat16", "float16")
INTS = ("int32", "int8", "uint8", "uint32")


def drawn(shape, dtype="float32", seed=0):
    """Values of both signs, or over the whole range of an integer type."""
    rng, dtype = np.random.default_rng([seed, *shape]), jnp.dtype(dtype)
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    if jnp.issubdtype(dtype, np.integer):
        span = jnp.iinfo(dtype)
        return rng.integers(span.min, span.max, shape, dtype, endpoint=True)
    return rng.normal(size=shape).astype(dtype)


def wild(shape, dtype="float32", seed=0):
    """Values of which some are NaN of either sign, infinite, extreme or zero."""
    x, rng = drawn(shape, dtype, seed), np.random.default_rng([seed, 7])
    if jnp.issubdtype(x.dtype, np.inexact):
        for value in (np.inf, -np.inf, 1e4, 0.0, -0.0, np.nan, -np.nan):
            x.flat[rng.integers(x.size, size=1 + x.size // 30)] = value
    return x


def of_all(fn, dtype="float32", shapes=SHAPES):
    """Return a member per shape, and one more of odd values."""
    return [(fn, (drawn(s, dtype),)) for s in shapes] + [
        (fn, (wild(shapes[0], dtype, 1),))
    ]


def full_of(fn, value, dtype="float32"):
    """Return members whose values are all the same."""
    return [(fn, (np.full(s, value, jnp.dtype(dtype)),)) for s in SHAPES]


def reduced(name, axes):
    if name.startswith("arg"):
        return lambda x: getattr(lax, name)(x, axes[0], np.int32)
    return lambda x: getattr(lax, name)(x, axes)


ARITHMETIC = ("reduce_sum", "reduce_prod")
ORDERED = ("reduce_max", "reduce_min", "argmax", "argmin")
BITS = ("reduce_and", "reduce_or", "reduce_xor")


def tolerance(name, dtype):
    if name in (*ARITHMETIC, "cumsum", "cumprod", "cumlogsumexp", "reduce_window_sum"):
        error = {"bfloat16": 5e-2, "float16": 5e-3, "float32": 1e-5}
        error["complex64"] = 1e-5
        return dict.fromkeys(("rtol", "atol"), error.get(dtype, 0.0))
    return {}


@pytest.mark.parametrize(
    "name, axes",
    [("reduce_sum", axes) for axes in ((0,), (1,), (2,), (0, 2), (0, 1, 2))]
    + [
        ("reduce_max", (2,)),
        ("reduce_max", (0, 1)),
        ("argmin", (0,)),
        ("argmin", (2,)),
    ],
)
def test_a_reduction_over_any_axes(name, axes):
    check(name, of_all(reduced(name, axes)), **tolerance(name, "float32"))


@pytest.mark.parametrize(
    "name, dtype",
    [(n, d) for n in ARITHMETIC for d in ("bfloat16", "int32", "complex64")]
    + [(n, d) for n in ORDERED for d in ("bfloat16", "int8")]
    + [("reduce_max", "uint8"), ("argmin", "uint8"), ("argmax", "int32")]
    + [(n, d) for n in BITS for d in ("bool", "int8", "uint32")]
    + [("reduce_min", "float32"), ("reduce_prod", "float32"), ("argmax", "float16")],
)
def test_a_reduction_of_any_type(name, dtype):
    members = of_all(reduced(name, (1,)), dtype)
    check(name, members, **tolerance(name, dtype))


@pytest.mark.parametrize(
    "name, value",
    [
        ("reduce_max", -np.inf),
        ("reduce_min", np.inf),
        ("argmax", -np.inf),
        ("argmin", np.inf),
        ("argmax", np.nan),
        ("argmin", np.nan),
        ("argmax", 0),
    ],
)
def test_a_row_of_nothing_but_the_neutral_element(name, value):
    check(name, full_of(reduced(name, (1,)), value))


@pytest.mark.parametrize("name", ["reduce_max", "argmax", "reduce_min", "argmin"])
def test_a_row_of_nothing_but_the_extreme_integer(name):
    span = np.iinfo(np.int8)
    value = span.min if name.endswith("max") else span.max
    check(name, full_of(reduced(name, (1,)), value, "int8"))


def test_reductions_share_by_axes():
    x = drawn((3, 4, 5))
    one, other = (reduced("reduce_sum", (a,)) for a in (0, 1))
    assert share("reduce_sum", [(one, (x,)), (one, (x[:2],))])
    assert not share("reduce_sum", [(one, (x,)), (other, (x,))])
    assert not share("reduce_sum", [(one, (x,)), (one, (x.astype("i"),))])
    short = lambda x: lax.argmax(x, 0, np.int16)  # noqa: E731
    assert not share("argmax", [(reduced("argmax", (0,)), (x,)), (short, (x,))])


def scanned(name, axis, reverse):
    return lambda x: getattr(lax, name)(x, axis=axis, reverse=reverse)


SCANS = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SCANS)
def test_a_scan_along_an_axis(name, reverse):
    for axis in (0, 1, 2) if name == "cumsum" and reverse else (1,):
        fn = scanned(name, axis, reverse)
        check(name, of_all(fn), **tolerance(name, "float32"))


@pytest.mark.parametrize("name", SCANS[:4])
def test_a_scan_of_integers(name):
    check(name, of_all(scanned(name, 1, True), "uint8"))


@pytest.mark.parametrize(
    "name, value", [("cummax", -np.inf), ("cumlogsumexp", -np.inf)]
)
def test_a_scan_of_nothing_but_the_neutral_element(name, value):
    check(name, full_of(scanned(name, 1, True), value))


def test_scans_share_by_direction():
    x = drawn((3, 4))
    ways = [scanned("cumsum", a, r) for a, r in ((0, False), (0, True), (1, False))]
    assert not share("cumsum", [(ways[0], (x,)), (ways[1], (x,))])
    assert not share("cumsum", [(ways[0], (x,)), (ways[2], (x,))])


def sorted_by(dimension, num_keys=1, is_stable=True):
    return lambda *xs: lax.sort(
        xs, dimension=dimension, num_keys=num_keys, is_stable=is_stable
    )


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("shapes", [SHAPES, [(3, 5, 4), (2, 5, 9)]])
def test_a_sort_along_any_axis(dimension, shapes):
    check("sort", of_all(sorted_by(dimension), shapes=shapes))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "uint32", "bool", "complex64"])
def test_a_sort_of_any_type(dtype):
    check("sort", of_all(sorted_by(1), dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sort_of_nothing_but_the_last(value):
    members = full_of(sorted_by(1), value)
    check("sort", [*members, (sorted_by(1), (wild((2, 9, 3)),))])


@pytest.mark.parametrize("num_keys", [1, 2])
def test_a_sort_of_several_operands(num_keys):
    members = []
    for i, shape in enumerate(SHAPES):
        few = np.round(wild(shape, seed=i))  # ties, broken by the second or by place
        places = np.broadcast_to(np.arange(shape[1], dtype="i")[:, None], shape)
        args = (few, drawn(shape, "int8"), places)
        members.append((sorted_by(1, num_keys), args))
    check("sort", members)


def test_sorts_share_by_their_keys():
    x, y = drawn((3, 4)), drawn((3, 4), "int32")
    plain = (sorted_by(0), (x, y))
    assert share("sort", [plain, (sorted_by(0), (x[:2], y[:2]))])
    for how in ((1,), (0, 2), (0, 1, False)):
        assert not share("sort", [plain, (sorted_by(*how), (x, y))])
    assert not share("sort", [plain, (sorted_by(0), (x,))])


def top(k, axis=-1):
    return lambda x: lax.top_k(x, k, axis=axis)


# Largest first, as top_k orders float32: by sign, then by bits.
TOTAL_ORDER = np.array(
    [0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x7F800000, 0x7F7FFFFF, 0x3F800000, 1, 0]
    + [0x80000000, 0x80000001, 0xBF800000, 0xFF7FFFFF, 0xFF800000, 0xFFC00000]
    + [0xFFFFFFFF],
    np.uint32,
).view("f")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_largest_along_any_axis(axis):
    members = [(top(s[axis], axis), (drawn(s),)) for s in SHAPES]
    check("top_k", [*members, (top(2, axis), (wild(SHAPES[0]),))])


@pytest.mark.parametrize("dtype", [*FLOATS[1:], *INTS, "bool"])
def test_the_largest_of_any_type(dtype):
    members = [
        (top(k), (wild((2, n), dtype, n),)) for k, n in ((3, 7), (1, 1), (5, 33))
    ]
    check("top_k", members)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8", "bool"])
def test_padding_is_never_among_the_largest(dtype):
    members = []
    for n in (4, 1, 9):
        lowest = np.zeros(n, jnp.dtype(dtype))
        if dtype == "int8":
            lowest[:] = -128
        elif dtype == "float32":
            lowest[:] = TOTAL_ORDER[-1]
        elif dtype == "bfloat16":
            lowest.view(np.uint16)[:] = 0xFFFF
        members.append((top(n), (lowest,)))
    check("top_k", members)


def test_the_largest_are_a_jobs_own_bits():
    rng = np.random.default_rng(0)
    members = [(top(n), (rng.choice(TOTAL_ORDER, n),)) for n in (1, 7, 40)] + [
        (top(len(TOTAL_ORDER)), (rng.permutation(TOTAL_ORDER),))
    ]
    alone, (values, places) = merged("top_k", members, None)
    for row, (want, want_places) in enumerate(alone):
        own = np.asarray(values.array)[row, : len(want)].view(np.uint32)
        np.testing.assert_array_equal(own, np.asarray(want).view(np.uint32))
        own = np.asarray(places.array)[row, : len(want)]
        np.testing.assert_array_equal(own, want_places)


def test_as_many_of_the_largest_as_the_job_asks_for():
    members = [(top(k), (wild((3, 8), seed=k),)) for k in (1, 8, 3)]
    check("top_k", members)


def test_no_sharing_of_other_orders():
    x = drawn((4, 5))
    assert share("top_k", [(top(2), (x,)), (top(3), (x[:3],))])
    assert not share("top_k", [(top(2, 0), (x,)), (top(2, 1), (x,))])
    tiny = x.astype(jnp.float8_e4m3fn)
    assert not share("top_k", [(top(2), (tiny,)), (top(2), (tiny[:2],))])


MONOIDS = {"sum": (0, lax.add), "max": (-np.inf, lax.max), "min": (np.inf, lax.min)}


def windowed(name, size, strides=None, padding="VALID", **dilations):
    start, monoid = MONOIDS[name]
    strides = strides or (1,) * len(size)

    def fn(x):
        init = start
        if x.dtype == np.int32 and name != "sum":
            init = getattr(np.iinfo(np.int32), "min" if name == "max" else "max")
        init = np.asarray(init, x.dtype)
        return lax.reduce_window(x, init, monoid, size, strides, padding, **dilations)

    return fn


WINDOWS = {
    "plain": ((1, 2, 1), (1, 2, 1), "VALID"),
    "overlapping": ((1, 3, 2), (1, 2, 1), [(0, 0), (1, 2), (1, 0)]),
    "same": ((1, 2, 2), (1, 2, 2), "SAME"),
    "past_the_end": ((1, 1, 1), (1, 1, 2), [(0, 0), (0, 2), (0, 1)]),
}
IMAGES = [(3, 5, 4), (1, 2, 2), (2, 8, 11)]


@pytest.mark.parametrize(
    "name, how", [(n, h) for n in ("sum", "max") for h in WINDOWS] + [("min", "same")]
)
def test_windows_over_any_sizes(name, how):
    name, fn = f"reduce_window_{name}", windowed(name, *WINDOWS[how])
    check(name, of_all(fn, shapes=IMAGES), **tolerance(name, "float32"))


@pytest.mark.parametrize("name", MONOIDS)
@pytest.mark.parametrize("dtype", ["int32", "bfloat16"])
def test_windows_of_other_types(name, dtype):
    name, fn = f"reduce_window_{name}", windowed(name, *WINDOWS["same"])
    check(name, of_all(fn, dtype, IMAGES), **tolerance(name, dtype))


@pytest.mark.parametrize("name", MONOIDS)
def test_windows_with_holes(name):
    pads = [(0, 0), (1, 1), (0, 2)]
    fn = windowed(
        name,
        (1, 2, 3),
        (1, 1, 2),
        pads,
        base_dilation=(1, 2, 1),
        window_dilation=(1, 1, 2),
    )
    name, shapes = f"reduce_window_{name}", [(1, 5, 5), (2, 2, 9), (1, 1, 7)]
    check(name, of_all(fn, shapes=shapes), **tolerance(name, "float32"))


@pytest.mark.parametrize(
    "name, how",
    [("max", "plain"), ("max", "overlapping"), ("max", "same"), ("min", "overlapping")],
)
def test_the_derivative_of_a_pool(name, how):
    pool = windowed(name, *WINDOWS[how])

    def backward(g, x):
        return jax.vjp(pool, x)[1](g)

    members = []
    for seed, shape in enumerate([*IMAGES, IMAGES[0]]):
        x = (drawn if seed % 2 else wild)(shape, seed=seed)
        members.append((backward, (drawn(jax.eval_shape(pool, x).shape), x)))
    check("select_and_scatter_add", members, **CLOSE)


def test_windows_share_by_how_they_slide():
    x, how = drawn((1, 7)), ((1, 2), (1, 2), [(0, 0), (1, 1)])
    plain = (windowed("max", *how), (x,))
    longer = (windowed("max", *how[:2], [(0, 0), (1, 0)]), (x,))
    assert share("reduce_window_max", [plain, longer])
    for other in (
        ((1, 3), (1, 2), how[2]),
        ((1, 2), (1, 1), how[2]),
        ((1, 2), (1, 2), [(0, 0), (0, 1)]),
    ):
        assert not share("reduce_window_max", [plain, (windowed("max", *other), (x,))])
    product = lambda x: lax.reduce_window(x, 1.0, lax.mul, *how)  # noqa: E731
    assert not share("reduce_window", [(product, (x,)), (product, (x[:, :5],))])


SIZE = st.sampled_from((1, 2, 5, 11))  # few, so that what was compiled serves again


@quick
@hypothesis.given(data=st.data())
def test_any_reduction(data):
    name = data.draw(st.sampled_from(("reduce_sum", "reduce_min", "argmax")))
    shapes = [(data.draw(SIZE), data.draw(SIZE)) for _ in range(3)]
    members = [(reduced(name, (1,)), (wild(s, seed=i),)) for i, s in enumerate(shapes)]
    check(name, members, **tolerance(name, "float32"))


@quick
@hypothesis.given(data=st.data())
def test_any_order(data):
    dtype = data.draw(st.sampled_from(("float32", "bfloat16")))
    xs = [wild((data.draw(SIZE), data.draw(SIZE)), dtype, i) for i in range(3)]
    is_sort, is_short = data.draw(st.booleans()), data.draw(st.booleans())
    if is_sort:
        check("sort", [(sorted_by(1), (x,)) for x in xs])
    else:
        ks = [(x.shape[1] + 1) // 2 if is_short else x.shape[1] for x in xs]
        check("top_k", [(top(k), (x,)) for x, k in zip(xs, ks, strict=True)])
