"""Launches of products and convolutions: masked on both sides of a contraction."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from stfuse import _rules
from stfuse._rules import Merge, Stack
from tests.merging import check, compute, op_of, pad_to, share

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
quick = hypothesis.settings(max_examples=12, deadline=None, database=None)


def drawn(shape, seed=0, dtype="f"):
    x = np.random.default_rng([seed, *shape]).normal(size=shape)
    return (x if np.issubdtype(dtype, np.floating) else 9 * x).astype(dtype)


def wild(shape, seed=0):
    """Values of which some are NaN, infinite or extreme."""
    x, rng = drawn(shape, seed), np.random.default_rng([seed, 7])
    for value in (np.nan, np.inf, -np.inf, 1e18):
        x.flat[rng.integers(x.size)] = value
    return x


def stacked(outs, row, want):
    return np.asarray(outs.array)[(row, *map(slice, want.shape))]


# Dimension numbers, then per member the shapes of the operands.
DOTS = {
    "matmul": (
        (((1,), (0,)), ((), ())),
        [((3, 5), (5, 4)), ((1, 1), (1, 1)), ((3, 7), (7, 2)), ((64, 2), (2, 33))],
    ),
    "contracted_first": (
        (((0,), (1,)), ((), ())),
        [((5, 3), (4, 5)), ((1, 3), (1, 1)), ((13, 2), (9, 13))],
    ),
    "vectors": ((((0,), (0,)), ((), ())), [((5,), (5,)), ((1,), (1,)), ((31,), (31,))]),
    "outer": ((((), ()), ((), ())), [((5,), (2,)), ((1,), (3,))]),
    "batch": (
        (((2,), (1,)), ((0,), (0,))),
        [((2, 3, 5), (2, 5, 4)), ((1, 1, 1), (1, 1, 1)), ((7, 2, 11), (7, 11, 3))],
    ),
    "batch_in_the_middle": (
        (((0,), (2,)), ((1,), (1,))),
        [((5, 2, 3), (4, 2, 5)), ((2, 7, 1), (1, 7, 2)), ((1, 1, 9), (3, 1, 1))],
    ),
    "attention": (
        (((3,), (3,)), ((0, 2), (0, 2))),
        [((1, 5, 2, 4), (1, 7, 2, 4)), ((1, 3, 3, 8), (1, 3, 3, 8))],
    ),
    "two_contracted": (
        (((2, 0), (0, 1)), ((), ())),
        [((2, 3, 5), (5, 2, 4)), ((1, 3, 7), (7, 1, 1)), ((5, 1, 1), (1, 5, 6))],
    ),
    "all_contracted": (
        (((0, 1), (0, 1)), ((), ())),
        [((2, 3), (2, 3)), ((1, 1), (1, 1)), ((5, 2), (5, 2))],
    ),
    "nothing_to_contract": (
        (((1,), (0,)), ((), ())),
        [((3, 0), (0, 4)), ((2, 5), (5, 3))],
    ),
}


def dotted(dims, **how):
    return lambda x, y: lax.dot_general(x, y, dims, **how)


@pytest.mark.parametrize("dims, shapes", DOTS.values(), ids=DOTS)
def test_a_product_of_any_sizes(dims, shapes):
    fn, (a, b) = dotted(dims), shapes[-1]
    members = [(fn, (drawn(a), drawn(b, 1))) for a, b in shapes]
    check("dot_general", [*members, (fn, (wild(a), wild(b, 1)))], **CLOSE)


@pytest.mark.parametrize(
    "dtype, how, tolerance",
    [
        ("bfloat16", {}, {"rtol": 2e-2, "atol": 2e-2}),
        ("float16", {}, {"rtol": 2e-3, "atol": 2e-3}),
        ("bfloat16", {"preferred_element_type": np.float32}, CLOSE),
        ("int32", {}, {}),
        ("int8", {"preferred_element_type": np.int32}, {}),
        ("uint8", {}, {}),
        ("complex64", {"precision": "highest"}, CLOSE),
    ],
)
def test_products_of_other_types(dtype, how, tolerance):
    dims, shapes = DOTS["batch"]
    dtype = jnp.dtype(dtype)
    members = [
        (dotted(dims, **how), (drawn(a).astype(dtype), drawn(b, 1).astype(dtype)))
        for a, b in shapes
    ]
    check("dot_general", members, **tolerance)


def test_products_share_by_what_they_contract():
    x, y, z = drawn((3, 3)), drawn((3, 3), 1), drawn((3, 3, 3))
    plain = (dotted((((1,), (0,)), ((), ()))), (x, y))
    others = [
        (dotted((((0,), (0,)), ((), ()))), (x, y)),
        (dotted((((1,), (0,)), ((), ())), precision="default"), (x, y)),
        (dotted((((1,), (0,)), ((), ())), preferred_element_type=np.float32), (x, y)),
        (dotted((((1,), (0,)), ((), ()))), (z, y)),
        (dotted((((1,), (0,)), ((), ()))), tuple(map(jnp.bfloat16, (x, y)))),
    ]
    same = dotted((((np.int64(1),), (np.int64(0),)), ((), ())))
    assert share("dot_general", [plain, (same, (x[:1], y))])
    for other in others:
        assert not share("dot_general", [plain, other])


def merged_with_one_lhs(name, fn, lhs, kernels):
    """Return each member alone, and the launch where all rows read one lhs."""
    ops = [op_of(name, fn, (lhs, k)) for k in kernels]
    wide = _rules.widen(ops)
    sizes = np.repeat([lhs.shape], len(ops), axis=0)
    rows = [pad_to(k, wide.in_specs[1].shape, np.nan) for k in kernels]
    shared = Stack(lhs, False, sizes, (False,) * lhs.ndim)
    own = np.array([k.shape for k in kernels])
    stack = Stack(jnp.stack(rows), True, own, (False,) * own.shape[1])
    merge = Merge(tuple(ops), (1,) * len(ops), wide, compute)
    (outs,) = _rules.launch(merge, [shared, stack])
    return [op.bind_fn(lhs, k)[0] for op, k in zip(ops, kernels, strict=True)], outs


def test_rows_that_share_an_operand():
    fn = dotted((((1,), (0,)), ((), ())))
    kernels = [drawn((5, n), n) for n in (1, 3, 8)]
    alone, outs = merged_with_one_lhs("dot_general", fn, drawn((2, 5)), kernels)
    for row, want in enumerate(alone):
        np.testing.assert_allclose(stacked(outs, row, want), want, **CLOSE)
    assert not any(outs.clean)


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
NHC, NDHWC = ("NHC", "HIO", "NHC"), ("NDHWC", "DHWIO", "NDHWC")
# How to convolve, then per member the shapes of the operands.
CONVS = {
    "nhwc_same": (
        {"padding": "SAME", "dimension_numbers": NHWC},
        [
            ((2, 7, 5, 3), (3, 3, 3, 4)),
            ((1, 1, 1, 1), (3, 3, 1, 1)),
            ((1, 4, 11, 8), (3, 3, 8, 2)),
        ],
    ),
    "nchw_valid": (
        {"padding": "VALID", "dimension_numbers": NCHW},
        [((1, 3, 7, 5), (4, 3, 3, 2)), ((2, 1, 3, 2), (5, 1, 3, 2))],
    ),
    "odd_layout": (
        {"padding": "VALID", "dimension_numbers": ("HNCW", "IWOH", "CWNH")},
        [((7, 1, 3, 5), (3, 2, 4, 3)), ((3, 2, 1, 6), (1, 2, 5, 3))],
    ),
    "one_axis": (
        {"padding": [(2, 0)], "dimension_numbers": NHC},
        [((1, 7, 3), (3, 3, 4)), ((1, 2, 5), (3, 5, 1)), ((3, 1, 1), (3, 1, 2))],
    ),
    "three_axes": (
        {"padding": "VALID", "dimension_numbers": NDHWC},
        [((1, 3, 4, 5, 2), (2, 2, 2, 2, 3)), ((1, 2, 5, 2, 1), (2, 2, 2, 1, 1))],
    ),
    "strides": (
        {"strides": (2, 3), "padding": [(1, 1), (0, 2)], "dimension_numbers": NHWC},
        [((1, 7, 8, 3), (3, 3, 3, 4)), ((1, 4, 5, 2), (3, 3, 2, 2))],
    ),
    "ends_that_differ": (
        {"strides": (2,), "padding": "SAME", "dimension_numbers": NHC},
        [((1, 7, 3), (2, 3, 4)), ((1, 8, 3), (2, 3, 4)), ((1, 1, 3), (2, 3, 4))],
    ),
    "kernel_dilation": (
        {"rhs_dilation": (2, 3), "padding": "VALID", "dimension_numbers": NHWC},
        [((1, 7, 9, 3), (3, 3, 3, 4)), ((1, 5, 7, 2), (3, 3, 2, 2))],
    ),
    "transposed": (
        {
            "lhs_dilation": (2, 2),
            "padding": [(2, 1), (1, 2)],
            "dimension_numbers": NHWC,
        },
        [
            ((1, 5, 3, 3), (3, 3, 3, 4)),
            ((1, 1, 8, 2), (3, 3, 2, 2)),
            ((1, 0, 3, 2), (3, 3, 2, 2)),
        ],
    ),
    "cut_ends": (
        {"padding": [(-1, -2)], "dimension_numbers": NHC},
        [((1, 9, 3), (3, 3, 4)), ((1, 6, 2), (3, 2, 2))],
    ),
    "pointwise": (
        {"padding": "VALID", "dimension_numbers": NHWC},
        [((1, 9, 3, 4), (1, 1, 4, 4)), ((2, 1, 5, 3), (1, 1, 3, 2))],
    ),
    "pointwise_strides": (
        {"strides": (2, 2), "padding": "SAME", "dimension_numbers": NHWC},
        [((1, 9, 3, 4), (1, 1, 4, 4)), ((2, 2, 4, 3), (1, 1, 3, 2))],
    ),
    "pointwise_past_the_end": (
        {"padding": [(0, 2)], "dimension_numbers": NHC},
        [((1, 4, 4), (1, 4, 4)), ((1, 2, 3), (1, 3, 2))],
    ),
    "groups": (
        {"feature_group_count": 3, "padding": "SAME", "dimension_numbers": NHWC},
        [((1, 5, 4, 6), (3, 3, 2, 9)), ((1, 7, 2, 6), (3, 3, 2, 9))],
    ),
    "kernels_that_differ": (
        {"padding": "VALID", "dimension_numbers": NHC},
        [
            ((2, 9, 3), (3, 3, 4)),
            ((1, 9, 2), (4, 2, 5)),
            ((1, 5, 4), (5, 4, 1)),
            ((1, 2, 1), (1, 1, 1)),
        ],
    ),
    "kernels_that_differ_in_all": (
        {
            "strides": (2, 1),
            "padding": [(1, 0), (0, 1)],
            "lhs_dilation": (1, 2),
            "rhs_dilation": (2, 1),
            "dimension_numbers": ("NCHW", "IHOW", "HNCW"),
        },
        [((2, 3, 9, 4), (3, 3, 2, 2)), ((1, 1, 7, 5), (1, 2, 4, 3))],
    ),
}


def convolved(strides=None, **how):
    def fn(x, k):
        return lax.conv_general_dilated(x, k, strides or (1,) * (x.ndim - 2), **how)

    return fn


@pytest.mark.parametrize("how, shapes", CONVS.values(), ids=CONVS)
def test_a_convolution_of_any_sizes(how, shapes):
    fn = convolved(**how)
    members = [(fn, (drawn(a), drawn(b))) for a, b in shapes]
    a, b = shapes[0]
    check("conv_general_dilated", [*members, (fn, (wild(a), drawn(b)))], **CLOSE)


def test_a_kernel_may_hold_anything():
    fn = convolved(padding="VALID", dimension_numbers=NHC)
    shapes = [((1, 7, 3), (3, 3, 4)), ((1, 9, 5), (2, 5, 4)), ((1, 4, 1), (3, 1, 6))]
    members = [(fn, (drawn(a), wild(b))) for a, b in shapes]
    check("conv_general_dilated", members, **CLOSE)
    check("conv_general_dilated", members[::2], **CLOSE)


@pytest.mark.parametrize("per_group, multiplier", [(1, 1), (1, 3), (2, 2)])
def test_groups_that_differ_in_number(per_group, multiplier):
    members = []
    for num_groups, size in ((2, 5), (7, 3), (3, 8)):
        fn = convolved(
            padding="SAME", dimension_numbers=NHWC, feature_group_count=num_groups
        )
        x = wild((1, size, 4, num_groups * per_group))
        kernel = drawn((3, 3, per_group, num_groups * multiplier))
        members.append((fn, (x, kernel)))
    check("conv_general_dilated", members, **CLOSE)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [("bfloat16", {"rtol": 2e-2, "atol": 5e-2}), ("int32", {}), ("float16", CLOSE)],
)
@pytest.mark.parametrize("case", ["nhwc_same", "kernels_that_differ"])
def test_convolutions_of_other_types(case, dtype, tolerance):
    how, shapes = CONVS[case]
    dtype = jnp.dtype(dtype)
    how = {**how, "preferred_element_type": np.float32} if dtype == np.float16 else how
    fn = convolved(**how)
    members = [
        (fn, (drawn(a).astype(dtype), drawn(b).astype(dtype))) for a, b in shapes
    ]
    check("conv_general_dilated", members, **tolerance)


def test_the_derivative_by_the_kernel():
    def fn(x, k, g):
        conv = convolved((2, 2), padding="SAME", dimension_numbers=NHWC)
        return jax.vjp(lambda k: conv(x, k), jnp.zeros((3, 3, x.shape[-1], 4)))[1](g)

    members = []
    for size, channels in ((9, 3), (5, 2), (1, 4)):
        out = -(-size // 2)
        args = (drawn((2, size, size, channels)), 0.0, drawn((2, out, out, 4)))
        members.append((fn, args))
    check("conv_general_dilated", members, **CLOSE)


def test_kernels_of_different_sizes_over_one_lhs():
    fn = convolved(padding="VALID", dimension_numbers=NHC)
    kernels = [drawn((n, 3, 2), n) for n in (3, 4, 5)]
    x = wild((2, 11, 3))
    alone, outs = merged_with_one_lhs("conv_general_dilated", fn, x, kernels)
    for row, want in enumerate(alone):
        np.testing.assert_allclose(stacked(outs, row, want), want, **CLOSE)


def test_convolutions_share_by_how_they_slide():
    how = {"padding": [(1, 1)], "dimension_numbers": NHC}
    x, k = drawn((1, 6, 4)), drawn((3, 4, 4))
    plain = (convolved(**how), (x, k))
    assert share("conv_general_dilated", [plain, (convolved(**how), (x[:, :2], k[:2]))])
    others = [
        (convolved(**how | {"padding": [(0, 1)]}), (x, k)),
        (convolved(**how, strides=(2,)), (x, k)),
        (convolved(**how, rhs_dilation=(2,)), (x, k)),
        (convolved(**how, lhs_dilation=(2,)), (x, k)),
        (convolved(**how, precision="default"), (x, k)),
        (convolved(**how | {"dimension_numbers": ("NHC", "HOI", "NHC")}), (x, k)),
        (convolved(**how, feature_group_count=2), (x, k[:, :2])),
    ]
    for other in others:
        assert not share("conv_general_dilated", [plain, other])


@pytest.mark.parametrize("kernel", [(3, 4, 4), (3, 1, 8), (2, 2, 4)])
def test_groups_share_by_their_own_size(kernel):
    how = {"padding": "VALID", "dimension_numbers": NHC}
    x = drawn((1, 6, 4))
    two = (convolved(**how, feature_group_count=2), (x, drawn((3, 2, 4))))
    groups = 4 // kernel[1]
    other = (convolved(**how, feature_group_count=groups), (x, drawn(kernel)))
    assert not share("conv_general_dilated", [two, other])


def test_no_sharing_of_groups_over_the_batch():
    how = {"padding": "VALID", "dimension_numbers": NHC, "batch_group_count": 2}
    members = [(convolved(**how), (drawn((4, n, 3)), drawn((3, 3, 4)))) for n in (5, 7)]
    assert not share("conv_general_dilated", members)


@quick
@hypothesis.given(data=st.data())
def test_any_product(data):
    size = st.integers(1, 9)
    dims = (((0, 3), (1, 0)), ((2,), (3,)))
    members = []
    for _ in range(data.draw(st.integers(2, 3))):
        a, b, c, d, e = (data.draw(size) for _ in range(5))
        args = wild((a, b, c, d)), drawn((d, a, e, c), 1)
        members.append((dotted(dims), args))
    check("dot_general", members, **CLOSE)


@quick
@hypothesis.given(data=st.data())
def test_any_convolution(data):
    size = st.integers(1, 6)
    num_groups = data.draw(st.sampled_from([1, 1, 2]))
    same_kernel = data.draw(st.integers(1, 3))
    low, stride, base, window = (
        data.draw(st.integers(*r)) for r in ((-1, 2), (1, 3), (1, 2), (1, 2))
    )
    members = []
    for _ in range(2):
        n, h, c, o, kernel = (data.draw(size) for _ in range(5))
        high = data.draw(st.integers(0, 2))
        kernel = same_kernel if num_groups > 1 else min(kernel, 3)
        groups = num_groups * data.draw(st.integers(1, 2)) if num_groups > 1 else 1
        c, o = (groups * 2, groups * 2) if groups > 1 else (c, o)
        fn = convolved(
            (stride,),
            padding=[(low, high)],
            lhs_dilation=(base,),
            rhs_dilation=(window,),
            dimension_numbers=NHC,
            feature_group_count=groups,
        )
        members.append((fn, (wild((n, h, c)), drawn((kernel, c // groups, o)))))
    hypothesis.assume(share("conv_general_dilated", members))
    check("conv_general_dilated", members, **CLOSE)
