"""Index launches: what is out of range is so against each row's own size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from stfuse import _rules
from tests import merging
from tests.merging import merged, share

LOW, HIGH = np.iinfo(np.int32).min, np.iinfo(np.int32).max
MODES = ["clip", "fill", "promise_in_bounds"]


def drawn(*shape, seed=0, dtype="f"):
    """Values with a NaN and an infinity among them, if floating and of no seed."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.integers(-9, 9, shape).astype(dtype)
    if dtype == "f" and not seed:
        x.reshape(-1)[:1] = np.nan
        x.reshape(-1)[-1:] = np.inf
    return x


def check(name, members, **options):
    merging.check(name, members, fills=("even", "odd"), is_compiled=True, **options)


def check_one(name, members, data):
    fill = data.draw(st.sampled_from([None, 0, "even", "odd"]))
    merging.check(name, members, fills=[fill], is_compiled=True)


def clean_axes(name, members, fill=0):
    return merged(name, members, fill)[1][0].clean


# Slices at one place


def cut(shape, sizes, starts, dtype="i4"):
    """A member that slices at some starts."""
    fn = partial(lax.dynamic_slice_p.bind, slice_sizes=tuple(sizes))
    return fn, (drawn(*shape), *np.asarray(starts, dtype))


def put(shape, sizes, starts, dtype="i4"):
    """A member that writes at some starts."""
    places = np.asarray(starts, dtype)
    args = (drawn(*shape), drawn(*sizes, seed=1), *places)
    return lax.dynamic_update_slice_p.bind, args


BOTH = pytest.mark.parametrize(
    "name, fn", [("dynamic_slice", cut), ("dynamic_update_slice", put)]
)


@BOTH
@pytest.mark.parametrize(
    "members",
    [
        # one window size: in range, at the end, past it, before the start
        [((5,), (2,), (1,)), ((9,), (2,), (8,)), ((3,), (2,), (HIGH,))],
        [((5,), (2,), (3,)), ((9,), (2,), (-1,)), ((2,), (2,), (LOW,))],
        # windows of own sizes; the widest in the smallest operand
        [((5,), (5,), (4,)), ((9,), (1,), (8,)), ((7,), (3,), (4,))],
        # an axis that windows span, last and first
        [((5, 3), (1, 3), (9, 0)), ((8, 7), (1, 7), (6, 5)), ((2, 1), (1, 1), (1, 0))],
        [((3, 5), (3, 2), (1, 9)), ((7, 8), (7, 2), (2, 5))],
        # all of it, and part of it in the middle
        [((4, 5, 2), (4, 2, 1), (3, 9, 1)), ((3, 8, 6), (2, 2, 5), (2, 6, 1))],
        [((), (), ()), ((), (), ())],
    ],
)
def test_starts_are_clamped_to_own_sizes(name, fn, members):
    check(name, [fn(*m) for m in members])


@BOTH
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u4", jnp.int4, jnp.uint4])
def test_starts_of_any_integer_type(name, fn, dtype):
    # XLA's own clamp of a write wraps where a type cannot hold the operand's size.
    top, size = jnp.iinfo(dtype).max, 300 if fn is cut else 7
    members = [((size,), (2,), (top,)), ((5,), (3,), (top,)), ((7,), (1,), (6,))]
    check(name, [fn(*m, dtype) for m in members])


def test_a_slice_is_clean_where_it_spans_the_operand():
    members = [cut((5, 3), (2, 3), (1, 0)), cut((8, 7), (4, 7), (6, 5))]
    assert clean_axes("dynamic_slice", members) == (False, True)
    assert clean_axes("dynamic_slice", members, "even") == (False, False)


def test_an_update_keeps_clean_what_it_leaves_alone():
    same = [put((5, 3), (2, 3), (1, 0)), put((8, 7), (2, 7), (6, 5))]
    other = [put((5, 3), (2, 3), (1, 0)), put((8, 7), (4, 5), (6, 5))]
    for members in (same, other):
        assert clean_axes("dynamic_update_slice", members) == (True, True)
        assert clean_axes("dynamic_update_slice", members, None) == (False, False)
    dirty_update, dirty_operand = (0, None, 0, 0), (None, 0, 0, 0)
    assert clean_axes("dynamic_update_slice", same, dirty_update) == (True, False)
    assert clean_axes("dynamic_update_slice", other, dirty_update) == (True, False)
    assert clean_axes("dynamic_update_slice", other, dirty_operand) == (False, False)
    merging.check("dynamic_update_slice", same + other[1:], fills=[dirty_update])


def test_operands_that_all_share():
    x = drawn(5, 3)
    members = [cut((5, 3), (n, 3), (start, 0)) for n, start in ((2, 3), (4, 9))]
    check("dynamic_slice", [(fn, (x, *args[1:])) for fn, args in members], shared=[0])


# Gather and scatter


def taken(table, ids, mode="fill", fill_value=None, dtype="i4", **options):
    """A member that looks up rows of a table."""
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    options |= {"mode": mode, "fill_value": fill_value}
    fn = partial(lax.gather, dimension_numbers=numbers, **options)
    fn = partial(fn, slice_sizes=(1, table.shape[1]))
    return fn, (table, np.asarray(ids, dtype)[:, None])


ROWS = [
    (drawn(5, 3), (0, 4, 5, -1, HIGH)),
    (drawn(8, 1), (7, 5, LOW)),
    (drawn(1, 7), (0, 1, 2, -8, 3, 0)),
    (drawn(8, 7), (8,)),
]


@pytest.mark.parametrize("how", [*((m,) for m in MODES), ("fill", 0), ("fill", 7.5)])
def test_rows_of_tables(how):
    check("gather", [taken(*row, *how) for row in ROWS])


@pytest.mark.parametrize("dtype", ["i4", "u1", "?", "f2", jnp.bfloat16])
def test_tables_of_any_type_are_filled_alike(dtype):
    rows = [(drawn(*x.shape, dtype="i4").astype(dtype), ids) for x, ids in ROWS]
    check("gather", [taken(*row) for row in rows])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["i1", "u4"])
def test_ids_of_any_type(mode, dtype):
    ids = (np.iinfo(dtype).max, 1, 3)
    rows = [(x, ids, mode) for x in (drawn(300, 2), drawn(5, 2))]
    check("gather", [taken(*row, dtype=dtype) for row in rows])
    check("scatter", [given_to("scatter", *row, dtype=dtype) for row in rows])


def test_one_table_for_all():
    table = drawn(11, 3)
    for mode in MODES:
        rows = [(table, ids, mode) for ids in ((1, 17), (-1, 2, 4, 19))]
        check("gather", [taken(*row) for row in rows], shared=[0])
        check("scatter", [given_to("scatter", *row) for row in rows], shared=[0])


def test_promises_about_ids_do_not_outlive_their_padding():
    options = {"indices_are_sorted": True, "unique_indices": True}
    members = [taken(x, (0, 1), "clip", **options) for x in (drawn(5, 3), drawn(2, 4))]
    members.append(taken(drawn(9, 2), (2, 4, 8), "clip", **options))
    check("gather", members)
    wide = _rules.widen([merging.op_of("gather", *member) for member in members])
    assert not any(wide.params[name] for name in options)


def test_rows_are_clean_where_the_table_is_unless_they_are_filled():
    def clean(mode, fill_value):
        members = [taken(*row, mode, fill_value) for row in ROWS]
        return clean_axes("gather", members)

    assert clean("clip", None) == clean("fill", 0) == (False, True)
    assert clean("fill", None) == clean("fill", 1) == (False, False)


def test_batching_dimensions():
    numbers = lax.GatherDimensionNumbers((), (1,), (1,), (0,), (0,))

    def member(rows, size, num, mode):
        ids = np.random.default_rng(size).integers(-3, 9, (rows, num, 1), "i4")
        how = {"dimension_numbers": numbers, "slice_sizes": (1, 1), "mode": mode}
        return partial(lax.gather, **how), (drawn(rows, size), ids)

    for mode in MODES:
        members = [member(3, 5, 2, mode), member(4, 2, 3, mode), member(1, 7, 1, mode)]
        check("gather", members)
        assert clean_axes("gather", members) == (mode != "fill", False)


SCATTERS = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-sub": lax.scatter_sub,
    "scatter-mul": lax.scatter_mul,
    "scatter-min": lax.scatter_min,
    "scatter-max": lax.scatter_max,
}
WRITES = [(name, "fill") for name in SCATTERS]
WRITES += [(name, mode) for name in list(SCATTERS)[:2] for mode in MODES[::2]]


def given_to(name, table, ids, mode="fill", dtype="i4", **options):
    """A member that writes rows of a table."""
    numbers = lax.ScatterDimensionNumbers((1,), (0,), (0,))
    fn = partial(SCATTERS[name], dimension_numbers=numbers, mode=mode, **options)
    updates = drawn(len(ids), table.shape[1], seed=1)
    return fn, (table, np.asarray(ids, dtype)[:, None], updates)


# Clamped, no two of one table are equal.
PLACES = [
    (drawn(5, 3), (2, HIGH, 1, -1)),
    (drawn(8, 1), (7, 5, LOW)),
    (drawn(1, 7), (4,)),
    (drawn(8, 7), (3, 8, 1, 5, 4)),
]


@pytest.mark.parametrize("name, mode", WRITES)
def test_writes_to_tables(name, mode):
    check(name, [given_to(name, *row, mode) for row in PLACES])


def test_a_table_stays_clean_where_updates_are():
    members = [given_to("scatter-add", *row) for row in PLACES]
    assert clean_axes("scatter-add", members) == (True, True)
    assert clean_axes("scatter-add", members, "even") == (True, False)


def applied(fn):
    return lambda x, i: x.at[i].apply(fn), (drawn(5), np.array([2], "i4"))


def windowed(shape, sizes):
    numbers = lax.GatherDimensionNumbers((1, 2), (), (0,))
    fn = partial(lax.gather, dimension_numbers=numbers, slice_sizes=sizes)
    return fn, (drawn(*shape), np.zeros((2, 1), "i4"))


def everywhere(num):
    """Updates of all of an operand: no index can drop one."""
    numbers = lax.ScatterDimensionNumbers((1,), (), ())
    fn = partial(lax.scatter_add, dimension_numbers=numbers)
    return fn, (drawn(5), np.zeros((num, 0), "i4"), drawn(num, 5))


TABLE, IDS = ROWS[0]
APART = [
    ("gather", [taken(TABLE, IDS, mode, 0) for mode in MODES[:2]]),
    ("gather", [taken(TABLE, IDS, fill_value=v) for v in (0, 1)]),
    ("gather", [windowed((5, 4), (n, 4)) for n in (1, 2)]),
    ("gather", [windowed((5, 4), (2, n)) for n in (2, 4)]),
    ("gather", [windowed((5, 4), (2, 2)), windowed((5, 2), (2, 2))]),
    ("scatter", [given_to("scatter", TABLE, IDS, mode) for mode in MODES[:2]]),
    ("scatter-add", [everywhere(num) for num in (2, 3)]),
]


@pytest.mark.parametrize("name, members", APART)
def test_other_windows_and_modes_do_not_share(name, members):
    assert not share(name, members)


def test_a_window_of_one_shares_where_it_is_all():
    check("gather", [windowed((n, 4 * n), (1, 4 * n)) for n in (1, 5)])


@pytest.mark.parametrize("mode", MODES)
def test_ids_of_64_bits_do_not_wrap(mode):
    with jax.enable_x64(True):
        ids = (2**32 + 1, -(2**32), 2)
        rows = [(x, ids, mode, "i8") for x in (drawn(5, 3), drawn(8, 2))]
        check("scatter", [given_to("scatter", *row) for row in rows])


def test_modes_of_one_meaning_share():
    rows = zip(ROWS[:2], MODES[::2], strict=True)
    check("gather", [taken(*row, mode) for row, mode in rows])
    rows = zip(PLACES[:2], MODES[1:], strict=True)
    check("scatter", [given_to("scatter", *row, mode) for row, mode in rows])


def test_writes_that_apply_a_function_share_with_their_equals_only():
    assert not share("scatter", [applied(jnp.sin), applied(jnp.cos)])


# Any numbers


@st.composite
def windows(draw):
    """Dimension numbers of a gather or scatter, and shapes of its members."""
    kinds = draw(st.permutations(["index", "span", draw(st.sampled_from(KINDS))]))
    num_batch = draw(st.integers(1, 2))
    batched = [a for a, kind in enumerate(kinds) if kind == "batch"]
    gone = [a for a, kind in enumerate(kinds) if kind == "index"]
    kept = [a for a in range(3) if a not in (*gone, *batched)]
    mapped = [a for a, kind in enumerate(kinds) if kind in ("index", "window")]
    mapped = draw(st.permutations(mapped))
    places = draw(st.permutations(range(num_batch + len(kept))))[: len(kept)]
    numbers = (
        *map(tuple, (sorted(places), gone, mapped, batched, [0] * len(batched))),
    )
    members = []
    for seed in range(2):
        shape = tuple(draw(st.sampled_from([3, 5, 8])) for _ in kinds)
        batch = [draw(st.sampled_from([1, 3, 4])) for _ in range(num_batch)]
        batch[:1] = [shape[a] for a in batched] or batch[:1]
        sizes = tuple(
            n if kind == "span" else 2 if kind == "window" else 1
            for n, kind in zip(shape, kinds, strict=True)
        )
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        ids = rng.integers(-2, 8, (*batch, len(mapped)), "i4")
        rest, inner = iter(batch), iter(sizes[a] for a in kept)
        out = [
            next(inner if a in places else rest) for a in range(num_batch + len(kept))
        ]
        members.append((drawn(*shape, seed=seed), ids, sizes, tuple(out)))
    return numbers, members


KINDS = ["index", "span", "window", "batch"]


@given(windows(), st.sampled_from(MODES), st.data())
def test_gathers_of_any_numbers(drawing, mode, data):
    numbers, members = drawing
    fn = partial(lax.gather, mode=mode)
    fn = partial(fn, dimension_numbers=lax.GatherDimensionNumbers(*numbers))
    members = [(partial(fn, slice_sizes=s), (x, ids)) for x, ids, s, _ in members]
    check_one("gather", members, data)


@given(windows(), st.sampled_from(MODES), st.sampled_from([*SCATTERS]), st.data())
def test_scatters_of_any_numbers(drawing, mode, name, data):
    numbers, members = drawing
    numbers = lax.ScatterDimensionNumbers(*numbers)
    fn = partial(SCATTERS[name], dimension_numbers=numbers, mode=mode)
    # Equal updates: the order of writes to one place is not defined.
    members = [(fn, (x, ids, np.full(out, 2, "f"))) for x, ids, _, out in members]
    check_one(name, members, data)


@BOTH
@given(data=st.data())
def test_slices_of_any_sizes_anywhere(name, fn, data):
    ndim, members = data.draw(st.integers(1, 2)), []
    for _ in range(2):
        shape = [data.draw(st.sampled_from([1, 3, 5, 8])) for _ in range(ndim)]
        sizes = [data.draw(st.sampled_from([1, (n + 1) // 2, n])) for n in shape]
        starts = [data.draw(st.integers(-3, 9)) for _ in shape]
        members.append(fn(shape, sizes, starts))
    check_one(name, members, data)


# Whole functions


def i32(*values):
    return np.array(values, "i4")


IDS_1D = [(drawn(5, 3), i32(0, 4, 5, -1, -6)), (drawn(8, 2), i32(7, -8, 99))]
IDS_2D = [(drawn(5, 3), i32([0, 4], [9, -1])), (drawn(2, 4), i32([1, -2], [-3, 2]))]
PAIRS = [(drawn(3, 5), i32([0, -5], [4, 5], [-6, 1])), (drawn(2, 1), i32([1], [-1]))]
PROGRAMS = {
    "rows": (lambda x, i: x[i], IDS_1D),
    "columns": (lambda x, i: x[:, i], IDS_1D),
    "table": (lambda x, i: jnp.take(x, i, axis=0), IDS_2D),
    "clip": (lambda x, i: jnp.take(x, i, axis=0, mode="clip"), IDS_1D),
    "wrap": (lambda x, i: jnp.take(x, i, axis=1, mode="wrap"), IDS_1D),
    "zero": (lambda x, i: x.at[i].get(mode="fill", fill_value=0), IDS_1D),
    "along": (lambda x, i: jnp.take_along_axis(x, i, axis=1), PAIRS),
    "both": (lambda x, i: x[i, i], IDS_1D),
    "set": (lambda x, i: x.at[i].set(7.0), IDS_1D),
    "add": (lambda x, i: x.at[i].add(1.0), IDS_1D),
    "clipped": (lambda x, i: x.at[i].max(3.0, mode="clip"), IDS_1D),
    "written": (lambda x, i: x.at[i, i].multiply(2.0), IDS_1D),
    "slope": (jax.grad(lambda x, i: (x[i] * 3.0)[0, 0]), IDS_1D),
    "place": (lambda x, i: lax.dynamic_slice(x, (i[1], i[0]), (1, 2)), IDS_1D),
    "item": (lambda x, i: lax.dynamic_index_in_dim(x, i[1], 1), IDS_1D),
    "cache": (lambda x, i: lax.dynamic_update_index_in_dim(x, x[0], i[1], 0), IDS_1D),
    "vmapped": (jax.vmap(lambda x, i: x[i]), PAIRS),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_whole_functions(name):
    merging.check_program(*PROGRAMS[name])
