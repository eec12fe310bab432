"""Products in other orders, and the kernels, interpreted: near what float64 gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import stfuse
from stfuse import _lower, _trace
from stfuse._cost import RECORDS
from stfuse._lower import _conv_kernel, _indexed, _store
from tests.test_lower import NUM_SLOTS, compute, conv_op, op_of

BOTH = (True, True)


@st.composite
def products(draw):
    """Draw a product: its dimension numbers and the shapes of both operands."""
    num_batch, num_contracted = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    size = st.integers(1, 4)
    common = [draw(size) for _ in range(num_batch + num_contracted)]
    sides = []
    for _ in range(2):
        free = draw(st.lists(size, max_size=2))
        axes = draw(st.permutations(range(len(common) + len(free))))
        shape = [0] * len(axes)
        for axis, n in zip(axes, [*common, *free], strict=True):
            shape[axis] = n
        sides.append((tuple(shape), axes[:num_batch], axes[num_batch : len(common)]))
    (x, batch_x, on_x), (w, batch_w, on_w) = sides
    dims = ((tuple(on_x), tuple(on_w)), (tuple(batch_x), tuple(batch_w)))
    return x, w, dims


@given(products())
def test_every_way_to_multiply_is_the_product(drawn):
    x_shape, w_shape, dims = drawn
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_SLOTS, *x_shape)).astype("f")
    w = rng.normal(size=(NUM_SLOTS, *w_shape)).astype("f")
    op = op_of(lambda w, x: lax.dot_general(x, w, dims), w[0], x[0])
    ways = _lower.candidates(op, BOTH, 1, NUM_SLOTS)
    assert {"native", "unrolled", "swapped"} <= set(ways)

    @jax.jit
    def every_way(x, w):
        return [_lower.apply(way, op, (x, w), BOTH)[0] for way in ways]

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else _x64():
        wide = lax.dot_general(
            *(jnp.asarray(a, jnp.float64) for a in (x, w)), _with_slots(dims)
        )
    for actual in every_way(x, w):
        np.testing.assert_allclose(actual, wide, rtol=0, atol=1e-5)


def _x64():
    from jax.experimental import enable_x64

    return enable_x64()


def _with_slots(dims):
    (on_x, on_w), (batch_x, batch_w) = (
        tuple(tuple(a + 1 for a in side) for side in pair) for pair in dims
    )
    return (on_x, on_w), ((0, *batch_x), (0, *batch_w))


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_only_a_product_of_few_rows_may_avoid_the_matrix_unit(rows):
    op = op_of(lambda w, x: x @ w, np.ones((3, 2), "f"), np.ones((1, 3), "f"))
    ways = _lower.candidates(op, BOTH, rows, NUM_SLOTS)
    assert ("multiply_reduce" in ways) == (rows <= 8)


@pytest.mark.parametrize(
    ("rows", "m", "k", "n", "is_ragged"),
    [
        (1, 16, 32, 48, False),
        (1, 15, 32, 48, True),
        (1, 16, 31, 48, True),
        (1, 16, 32, 49, True),
        (1, 1, 32, 48, True),
        (4, 1, 32, 48, False),  # its rows are hidden from it
        (4, 1, 31, 48, False),
        (4, 3, 32, 48, True),
        (1, 0, 31, 48, False),
    ],
)
def test_only_a_product_that_ends_within_a_tile_is_padded(rows, m, k, n, is_ragged):
    w, x = np.ones((k, n), "f"), np.ones((m, k), "f")
    op = op_of(lambda w, x: x @ w, w, x)
    assert ("padded" in _lower.candidates(op, BOTH, rows, NUM_SLOTS)) == is_ragged


def test_what_pads_a_product_meets_nothing_that_is_not_finite():
    x, w = np.ones((NUM_SLOTS, 3, 5), "f"), np.ones((NUM_SLOTS, 5, 7), "f")
    x[0, 1, 2], w[1, 4, 6] = np.inf, np.nan
    op = op_of(lambda w, x: x @ w, w[0], x[0])
    expected, actual = (compute(way, op, (x, w), BOTH) for way in ("native", "padded"))
    np.testing.assert_array_equal(actual, expected)


NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
# Images, kernel, strides, padding, dilation, layout: what a tile's edges can meet.
CONVOLUTIONS = {
    "odd sizes": ((2, 9, 7, 3), (3, 3, 3, 10), (1, 1), "SAME", (1, 1), NHWC),
    "a stem": ((1, 16, 16, 3), (7, 7, 3, 20), (2, 2), "SAME", (1, 1), NHWC),
    "ragged channels": ((1, 5, 5, 70), (3, 3, 70, 33), (1, 1), "SAME", (1, 1), NHWC),
    "long turns": (
        (1, 8, 8, 64),
        (3, 3, 64, 16),
        (2, 2),
        ((0, 1), (1, 0)),
        (1, 1),
        NHWC,
    ),
    "dilated": ((1, 8, 9, 16), (3, 2, 16, 16), (1, 2), ((2, 2), (2, 2)), (2, 2), NHWC),
    "channels first": ((2, 5, 12, 12), (8, 5, 3, 3), (1, 1), "SAME", (1, 1), NCHW),
    "no padding": ((1, 5, 6, 100), (1, 3, 100, 4), (1, 1), "VALID", (1, 1), NHWC),
}


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("row", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_the_convolution_kernel_is_the_convolution(row, rows):
    image, kernel, strides, padding, dilation, dims = row
    rng = np.random.default_rng(0)
    lead = (4,) if rows is None else (4, rows)
    x = jnp.asarray(rng.normal(size=(*lead, *image)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(4, *kernel)), jnp.bfloat16)
    op = conv_op(
        np.asarray(w[0]),
        np.asarray(x).reshape(-1, *image)[0],
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=dims,
    )

    def ours(x, w):
        return _conv_kernel.conv(op, x, w, is_interpreted=True)[0]

    def native(x, w):
        return _lower.apply("native", op, (x, w), BOTH)[0]

    if rows is not None:
        ours, native = (
            jax.vmap(fn, in_axes=(1, None), out_axes=1) for fn in (ours, native)
        )
    actual, expected = (np.asarray(jax.jit(fn)(x, w), "f") for fn in (ours, native))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=2e-2, atol=2e-2)


def test_a_kernel_is_measured_from_within_a_trace(live):
    op = conv_op(
        np.ones((3, 3, 4, 8), jnp.bfloat16),
        np.ones((1, 6, 6, 4), jnp.bfloat16),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=NHWC,
    )
    kernel = _lower.Candidate(
        lambda op, rows: True,
        functools.partial(_conv_kernel.conv, is_interpreted=True),
        is_whole=True,
    )
    live.setitem(_lower._CANDIDATES["conv_general_dilated"], "kernel", kernel)
    saved = []
    live.setattr(_store, "save", lambda question, seconds: saved.append(seconds))

    @jax.jit
    def step(x):
        size = {"num_slots": 4, "rows": 2, "cost": RECORDS[jax.default_backend()]}
        _lower.choose(op, BOTH, **size, mode="auto")
        return x

    step(1.0)
    assert set(saved[0]) == set(_lower.candidates(op, BOTH, 2, 4))
    assert "kernel" in saved[0]


# M, C, N, slots named, slots in all: ragged tiles, and sums in several parts.
NAMED = {
    "tiny": (1, 30, 33, 3, 5),
    "even": (5, 64, 128, 2, 4),
    "two tiles of rows": (130, 48, 20, 2, 3),
    "in parts": (16, 1030, 64, 1, 2),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("row", NAMED.values(), ids=NAMED)
def test_the_indexed_kernel_multiplies_by_the_named_slots(row, rows, dtype):
    num_rows, size, features, named, num_slots = row
    rng = np.random.default_rng(0)
    lead = (named,) if rows is None else (named, rows)
    x = jnp.asarray(rng.normal(size=(*lead, num_rows, size)), dtype)
    w = jnp.asarray(rng.normal(size=(num_slots, size, features)), dtype)
    index = np.array([num_slots + 4, 0, 0][:named], np.int32)  # clipped; and one twice
    op = op_of(
        lambda w, x: jnp.dot(x, w, precision="highest"),
        np.asarray(w[0]),
        np.asarray(x).reshape(-1, *x.shape[-2:])[0],
    )
    assert _indexed.is_plain(op)

    def run(x, w, index):
        return _indexed.dot(op, x, w, index, is_interpreted=True)[0]

    if rows is not None:
        run = jax.vmap(run, in_axes=(1, None, None), out_axes=1)
    chosen = np.asarray(w, "d")[np.clip(index, 0, num_slots - 1)]
    expected = np.einsum("k...mc,kcn->k...mn", np.asarray(x, "d"), chosen)
    actual = np.asarray(jax.jit(run)(x, w, index), "d")
    error = 1e-2 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(actual, expected, rtol=error, atol=error * size**0.5)


@pytest.fixture
def indexed_shapes(monkeypatch):
    """Let products read named slots in place, interpreted; return what they read."""
    seen = []

    def indexed(op, lhs, stack, index):
        seen.append(stack.shape)
        return _indexed.dot(op, lhs, stack, index, is_interpreted=True)

    monkeypatch.setattr(
        _lower, "can_index", lambda op, num_slots: _indexed.is_plain(op)
    )
    monkeypatch.setattr(_lower, "indexed", indexed)
    return seen


def test_unlike_jobs_of_a_subset_read_their_weights_in_place(indexed_shapes):
    def apply_fn(w, x):
        hidden = jnp.exp(jnp.dot(x, w["a"], precision="highest"))  # exp(0) is not 0
        return jnp.dot(hidden, w["b"], precision="highest")

    def job(name, width):
        rng = np.random.default_rng(len(name))
        params = {
            "a": rng.normal(size=(8, width)).astype("f") / 4,
            "b": rng.normal(size=(width, 3)).astype("f"),
        }
        if name == "nan":
            params["a"][:] = np.nan
        return stfuse.Job(name, apply_fn, params, np.ones((1, 8), "f"))

    jobs = [job("a", 5), job("bb", 5), job("nan", 7), job("c", 7), job("dd", 7)]
    fused = stfuse.fuse(jobs, cost="h200", lowering="heuristic")
    inputs = {name: np.full((2, 8), 0.5, "f") for name in ("bb", "c", "nan")}
    outs = fused(fused.pack(), inputs)
    assert indexed_shapes == [(5, 8, 7), (5, 7, 3)]  # both widths in one launch
    for name in inputs:
        alone = apply_fn(fused.jobs[name].params, inputs[name])
        np.testing.assert_allclose(outs[name], alone, rtol=1e-5, atol=1e-5)


def test_a_subset_may_read_its_weights_in_place(indexed_shapes):
    def apply_fn(w, x):
        return jnp.tanh(x @ w["a"]) @ w["b"]

    rng = np.random.default_rng(0)
    jobs = [
        stfuse.Job(
            name,
            apply_fn,
            {k: jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16) for k in "ab"},
            np.ones((1, 8), jnp.bfloat16),
        )
        for name in "pqrst"
    ]
    fused = stfuse.fuse(jobs, cost="cpu")
    bank = fused.pack()
    inputs = {name: np.full((2, 8), 0.5, jnp.bfloat16) for name in "qs"}
    outs = fused(bank, inputs)
    assert indexed_shapes == [(5, 8, 8), (5, 8, 8)]  # all slots, gathered by nobody
    for name in "qs":
        alone = apply_fn(fused.jobs[name].params, inputs[name])
        np.testing.assert_allclose(
            outs[name].astype("f"), np.asarray(alone, "f"), rtol=3e-2, atol=3e-2
        )

    def loss(bank, run):
        return run(bank)["q"].astype(jnp.float32).sum()

    grad = jax.grad(functools.partial(loss, run=lambda b: fused(b, inputs)))(bank)
    dense = {name: np.full((2, 8), 0.5, jnp.bfloat16) for name in "pqrst"}
    other = jax.grad(functools.partial(loss, run=lambda b: fused(b, dense)))(bank)
    for a, b in zip(grad.stacks, other.stacks, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, "f"), np.asarray(b, "f"), rtol=3e-2, atol=3e-2
        )


def test_a_product_that_is_not_rows_times_a_matrix_is_gathered():
    op = op_of(
        lambda w, x: jnp.einsum("ij,kj->ik", x, w), jnp.ones((3, 2)), jnp.ones((4, 2))
    )
    assert not _indexed.is_plain(op)
    op = next(
        op
        for op in _trace.trace(
            stfuse.Job(
                "job",
                lambda w, x: jnp.einsum("bij,bjk->bik", x, w),
                jnp.ones((2, 3, 4)),
                jnp.ones((2, 5, 3)),
                batched=False,
            )
        ).ops
        if op.is_heavy
    )
    assert not _indexed.is_plain(op)
