"""Every way to compute a launch gives the same numbers, near those of float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from jax import lax

import stfuse
from stfuse import _lower, _trace
from stfuse._cost import RECORDS
from stfuse._lower import _conv
from tests import cases
from tests.cases import BY_NAME

NUM_SLOTS = 2


def op_of(apply_fn, w, x):
    """Return the one heavy op of a function."""
    job = stfuse.Job("job", apply_fn, w, x, batched=False)
    (op,) = (op for op in _trace.trace(job).ops if op.is_heavy)
    return op


def conv_op(w, x, **options):
    return op_of(lambda w, x: lax.conv_general_dilated(x, w, **options), w, x)


def compute(name, op, operands, flags):
    run = functools.partial(_lower.apply, name, op, is_stacked=flags)
    (out,) = jax.jit(run)(operands)
    return np.asarray(out)


def reference(x, w, dims, strides, padding, lhs_dilation, rhs_dilation, groups):
    """Convolve in float64, one kernel element at a time."""
    lhs, rhs, out = dims
    x = np.transpose(x, [lhs.index(c) for c in "NC" + lhs.strip("NC")]).astype("f8")
    w = np.transpose(w, [rhs.index(c) for c in "OI" + lhs.strip("NC")]).astype("f8")
    for axis, dilation in enumerate(lhs_dilation, 2):
        if x.shape[axis]:
            shape = list(x.shape)
            shape[axis] = (shape[axis] - 1) * dilation + 1
            spread = np.zeros(shape)
            spread[(slice(None),) * axis + (slice(None, None, dilation),)] = x
            x = spread
    for axis, (low, high) in enumerate(padding, 2):
        x = np.pad(
            x,
            [
                (max(low, 0), max(high, 0)) if a == axis else (0, 0)
                for a in range(x.ndim)
            ],
        )
        size = x.shape[axis]
        x = x.take(range(max(-low, 0), size - max(-high, 0)), axis)
    extent = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], rhs_dilation, strict=True)]
    sizes = [
        max((n - e) // s + 1, 0) if n >= e else 0
        for n, e, s in zip(x.shape[2:], extent, strides, strict=True)
    ]
    y = np.zeros((x.shape[0], w.shape[0], *sizes))
    of, to = w.shape[1], w.shape[0] // groups
    for offset in itertools.product(*map(range, w.shape[2:])):
        window = x[
            (slice(None), slice(None))
            + tuple(
                slice(o * d, o * d + (n - 1) * s + 1 if n else o * d, s)
                for o, d, n, s in zip(offset, rhs_dilation, sizes, strides, strict=True)
            )
        ]
        for g in range(groups):
            y[:, g * to : (g + 1) * to] += np.einsum(
                "nc...,oc->no...",
                window[:, g * of : (g + 1) * of],
                w[(slice(g * to, (g + 1) * to), slice(None), *offset)],
            )
    canonical = "NC" + lhs.strip("NC")
    return np.transpose(y, [canonical.index(c) for c in out])


LAYOUTS = {
    1: [("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), ("NWC", "OWI", "NCW")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "NCHW")],
}


@st.composite
def convolutions(draw):
    """Draw a convolution, ordinary or odd."""
    rank = draw(st.integers(1, 2))
    each = functools.partial(st.lists, min_size=rank, max_size=rank)
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    lhs_dilation = draw(st.sampled_from([[1] * rank, [1] * rank, [2] * rank]))
    return {
        "dims": draw(st.sampled_from(LAYOUTS[rank])),
        "batch": draw(st.integers(1, 2)),
        "space": draw(each(st.integers(1, 6))),
        "kernel": draw(each(st.integers(1, 3))),
        "features": groups * draw(st.integers(1, 2)),
        "outputs": groups * draw(st.integers(1, 3)),
        "strides": draw(each(st.integers(1, 3))),
        "padding": draw(each(st.tuples(st.integers(-1, 2), st.integers(-1, 2)))),
        "rhs_dilation": draw(each(st.integers(1, 2))),
        "lhs_dilation": lhs_dilation,
        "groups": groups,
    }


def arrays_of(c, seed=0):
    """Return stacked images and kernels of a drawn convolution."""
    rng = np.random.default_rng(seed)
    lhs, rhs, _ = c["dims"]
    letters = lhs.strip("NC")
    sizes = dict(zip(letters, c["space"], strict=True))
    sizes |= {"N": c["batch"], "C": c["features"]}
    shape = [sizes[letter] for letter in lhs]
    sizes = dict(zip(letters, c["kernel"], strict=True))
    sizes |= {"I": c["features"] // c["groups"], "O": c["outputs"]}
    kernel = [sizes[letter] for letter in rhs]
    x = rng.normal(size=(NUM_SLOTS, *shape)).astype("f")
    w = rng.normal(size=(NUM_SLOTS, *kernel)).astype("f")
    return x, w


# A kernel wider than its image, and so an output without elements.
WIDE = {"space": [1], "kernel": [2], "rhs_dilation": [2], "padding": [(0, 0)]}
WIDE |= {"dims": LAYOUTS[1][0], "batch": 1, "features": 1, "outputs": 1, "groups": 1}
WIDE |= {"strides": [1], "lhs_dilation": [1]}


@given(convolutions())
@example(WIDE)
def test_every_way_to_convolve_is_the_convolution(c):
    low = [a + b for a, b in c["padding"]]
    assume(all(n + p > 0 for n, p in zip(c["space"], low, strict=True)))
    x, w = arrays_of(c)
    shared = ("strides", "padding", "lhs_dilation", "rhs_dilation")
    op = conv_op(
        w[0],
        x[0],
        window_strides=c["strides"],
        padding=c["padding"],
        lhs_dilation=c["lhs_dilation"],
        rhs_dilation=c["rhs_dilation"],
        dimension_numbers=c["dims"],
        feature_group_count=c["groups"],
    )
    expected = [
        reference(
            x[k], w[k], c["dims"], **{s: c[s] for s in shared}, groups=c["groups"]
        )
        for k in range(NUM_SLOTS)
    ]
    both = (True, True)
    ways = _lower.candidates(op, both, 1, NUM_SLOTS)
    if _conv.is_patchable(op):
        assert {"native", "unrolled", "patches"} <= set(ways)
    assert ("scaled" in ways) == _conv.is_depthwise(op)

    @jax.jit
    def every_way(x, w):
        return [_lower.apply(way, op, (x, w), both)[0] for way in ways]

    for actual in every_way(x, w):
        np.testing.assert_allclose(actual, np.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("way", ["native", "unrolled", "patches", "shifted"])
def test_an_operand_that_slots_share_is_used_by_each(way, flags):
    case = BY_NAME["conv"]
    job = cases.job(case, 0)
    op = next(op for op in _trace.trace(job).ops if op.is_heavy)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(NUM_SLOTS, 1, 3, 7, 6)).astype("f")
    kernels = rng.normal(size=(NUM_SLOTS, 4, 3, 3, 2)).astype("f")
    operands = [x if s else x[0] for x, s in zip((images, kernels), flags, strict=True)]
    actual = compute(way, op, operands, flags)
    for k in range(NUM_SLOTS):
        one = [x[k] if s else x for x, s in zip(operands, flags, strict=True)]
        np.testing.assert_allclose(actual[k], op.bind_fn(*one)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [
        ("i4", None),
        ("i1", np.int32),
        (ml_dtypes.bfloat16, None),
        (ml_dtypes.bfloat16, "f"),
    ],
)
def test_ways_keep_the_convolutions_dtype_and_accumulator(dtype, preferred):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (NUM_SLOTS, 1, 5, 5, 2)).astype(dtype)
    w = rng.integers(-3, 4, (NUM_SLOTS, 3, 3, 2, 3)).astype(dtype)
    op = conv_op(
        w[0],
        x[0],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=preferred,
    )
    assert op.specs[0].dtype == (preferred or dtype)
    native, patches, shifted = (
        compute(way, op, (x, w), (True, True))
        for way in ("native", "patches", "shifted")
    )
    assert patches.dtype == shifted.dtype == op.specs[0].dtype
    for found in (patches, shifted):  # the sums are small, and so exact
        np.testing.assert_array_equal(found.astype("f"), native.astype("f"))


def test_a_batch_grouped_convolution_is_not_written_as_patches():
    x, w = np.ones((4, 5, 2), "f"), np.ones((3, 2, 4), "f")
    op = conv_op(
        w,
        x,
        window_strides=(1,),
        padding="SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        batch_group_count=2,
    )
    assert not _conv.is_patchable(op)
    for way in ("native", "unrolled"):
        actual = compute(
            way, op, (np.stack([x, 2 * x]), np.stack([w, w])), (True, True)
        )
        one = np.asarray(op.bind_fn(x, w)[0])
        np.testing.assert_allclose(actual, [one, 2 * one])


OPS = {
    "dot": op_of(lambda w, x: x @ w, np.ones((3, 2), "f"), np.ones((1, 3), "f")),
    "top_k": op_of(lambda w, x: lax.top_k(x * w, 2), 2.0, np.ones((1, 3), "f")),
    "conv": _trace.trace(cases.job(BY_NAME["conv"], 0)).ops,
    "grouped": _trace.trace(cases.job(BY_NAME["grouped_conv"], 0)).ops,
    "transposed": _trace.trace(cases.job(BY_NAME["transposed_conv"], 0)).ops,
}
OPS = {
    name: next(op for op in ops if op.is_heavy) if isinstance(ops, tuple) else ops
    for name, ops in OPS.items()
}
BOTH = (True, True)
# What the chooser is told: op, stacked operands, slots, rows, cost, mode; and its word.
CHOICES = {
    "a product": ("dot", BOTH, 8, 1, "h200", "auto", "native"),
    "a product on a cpu": ("dot", BOTH, 8, 1, "cpu", "auto", "native"),
    "top_k": ("top_k", (True,), 8, 1, "cpu", "auto", "native"),
    "a convolution": ("conv", BOTH, 8, 1, "h200", "auto", "patches"),
    "a small one on a cpu": ("conv", BOTH, 8, 1, "cpu", "auto", "patches"),
    "many rows on a cpu": ("conv", BOTH, 8, 4096, "cpu", "auto", "unrolled"),
    "many rows on a gpu": ("conv", BOTH, 8, 4096, "h200", "auto", "patches"),
    "told not to choose": ("conv", BOTH, 8, 1, "h200", "native", "native"),
    "one slot": ("conv", BOTH, 1, 1, "h200", "auto", "native"),
    "a shared kernel": ("conv", (True, False), 8, 1, "h200", "auto", "native"),
    "groups": ("grouped", BOTH, 8, 1, "h200", "auto", "native"),
    "groups on a cpu": ("grouped", BOTH, 8, 1, "cpu", "auto", "unrolled"),
    "dilated input": ("transposed", BOTH, 8, 1, "h200", "auto", "native"),
}


@pytest.mark.parametrize("row", CHOICES.values(), ids=CHOICES)
def test_the_chooser_says(row):
    name, is_stacked, num_slots, rows, cost, mode, chosen = row
    cost = RECORDS[cost]
    size = {"num_slots": num_slots, "rows": rows, "cost": cost, "mode": mode}
    assert _lower.choose(OPS[name], is_stacked, **size) == chosen


def test_unrolling_serves_ops_of_several_outputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_SLOTS, 1, 5)).astype("f")
    op = op_of(lambda w, x: lax.top_k(x, 2), (), x[0])
    native, unrolled = (
        jax.jit(functools.partial(_lower.apply, way, op, is_stacked=(True,)))((x,))
        for way in ("native", "unrolled")
    )
    cases.assert_bitwise(jax.tree.map(jnp.asarray, unrolled), native)


@pytest.mark.parametrize("fn", [
    lambda w, x: x * w, lambda w, x: 0.5 * x, lambda w, x: jnp.where(x > 0, x, w),
    lambda w, x: x.astype(jnp.bfloat16), lambda w, x: x**3, lambda w, x: w[0, 0] ** 2.5,
    lambda w, x: lax.clamp(-1.0, x, 1.0), lambda w, x: lax.select(w[0, 0] > 0, x, w),
    lambda w, x: jnp.where(w[0, 0] > 1, 1.0, 2.0), lambda w, x: jnp.atan2(2.0, w[0]),
    lambda w, x: lax.optimization_barrier((w[0, 0], 3.0)),
    lambda w, x: jax.grad(lambda s: 2 * s + s**2)(w[0, 0]),
    lambda w, x: lax.select_n(w[0, 0] > 1, jnp.float32(3)),
])  # fmt: skip
def test_an_elementwise_op_of_stacks_is_the_program_that_mapping_it_is(fn):
    w = x = np.ones((1, 5), "f")
    for op in _trace.trace(stfuse.Job("a", fn, w, x, batched=False)).ops:
        for flags in itertools.product([True, False], repeat=len(op.in_specs)):
            if not any(flags):
                continue
            given = [
                jnp.ones((NUM_SLOTS,) * k + s.shape, s.dtype)
                for k, s in zip(flags, op.in_specs, strict=True)
            ]
            axes = [0 if k else None for k in flags]
            ours, mapped = (
                jax.make_jaxpr(f)(*given)
                for f in (
                    lambda *xs, op=op, k=flags: _lower.apply("native", op, xs, k),
                    jax.vmap(op.bind_fn, in_axes=axes),
                )
            )
            assert str(ours) == str(mapped)


def scanned(params, x, *, reverse=False, unroll=1):
    def step(h, v):
        h = jnp.tanh(h @ params["w"] + v)
        return h, (h.sum(), v)

    zero = jnp.zeros(x.shape[-1], x.dtype)
    return lax.scan(step, zero, x, reverse=reverse, unroll=unroll)


@pytest.mark.parametrize(("length", "options"), [
    (1, {}), (3, {}), (8, {}), (19, {}), (19, {"reverse": True}), (19, {"unroll": 16}),
])  # fmt: skip
@pytest.mark.parametrize("num_jobs", [1, 3])
def test_a_scan_of_several_steps_a_turn_answers_as_one_of_one(
    length, options, num_jobs
):
    def apply_fn(params, x):
        return jax.vmap(lambda one: scanned(params, one, **options))(x)

    rng = np.random.default_rng(length)
    inputs, jobs = {}, []
    for i in range(num_jobs):
        x = rng.standard_normal((2, length, 4)).astype(np.float32)
        params = {"w": rng.standard_normal((4, 4)).astype(np.float32)}
        jobs.append(stfuse.Job(f"job-{i}", apply_fn, params, x))
        inputs[f"job-{i}"] = x
    fused = stfuse.fuse(jobs, cost="h200")
    (launch,) = (one for one in fused.plan.launches if one.primitive == "scan")
    is_longer = 1 < length and "unroll" not in options
    assert launch.lowering == ("turns" if is_longer else "native")
    answers = fused(fused.pack(), inputs)
    for job in jobs:
        own = jax.jit(apply_fn)(job.params, inputs[job.name])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            answers[job.name],
            own,
        )


def test_a_scan_whose_steps_are_long_or_have_loops_or_branches_keeps_its_turns():
    def long(w, x):
        def step(h, _):
            for _ in range(9):
                h = jnp.tanh(h @ w)
            return h, None

        return lax.scan(step, x, length=20)[0]

    def nested(w, x):
        return lax.scan(lambda h, _: (h + scanned({"w": w}, h)[0], None), x, length=20)

    def branched(w, x):
        def step(h, t):
            inner = lambda h: scanned({"w": w}, h)[0] + h  # noqa: E731
            return lax.cond(t % 4 == 0, inner, jnp.tanh, h), None

        return lax.scan(step, x, np.arange(20))

    def wordy(w, x):
        def step(h, _):
            y = h @ w
            for i in range(300):
                y = y * jnp.float32(1 + i) + h
            return y, None

        return lax.scan(step, x, length=20)

    w, x = np.ones((4, 4), np.float32), np.ones((5, 4), np.float32)
    cost = RECORDS["h200"]
    for apply_fn in (long, nested, branched, wordy):
        op = op_of(apply_fn, w, x)
        flags = [True] * len(op.in_specs)
        options = {"num_slots": 2, "rows": 1, "cost": cost, "mode": "auto"}
        assert _lower.choose(op, flags, **options) == "native"
        assert _lower.unroll_of([op, op], cost, "auto") == 1
    op = op_of(lambda w, x: scanned({"w": w}, x), w, x)
    assert _lower.unroll_of([op, op], cost, "auto") == 5  # all there are
    assert _lower.unroll_of([op, op], cost, "native") == 1
    assert _lower.unroll_of([op, op], RECORDS["cpu"], "auto") == 1
