"""Plans of jobs whose plans can be written down by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import stfuse
from stfuse import _align, _merge, _trace
from stfuse._cost import RECORDS
from stfuse._plan import Launch, Plan, components
from tests import cases
from tests.cases import CASES

CPU = RECORDS["cpu"]


def dense(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def job(name, *widths):
    params = [np.ones(shape, "f") for shape in zip(widths, widths[1:], strict=False)]
    return stfuse.Job(name, dense, params, np.ones((1, widths[0]), "f"))


def align(jobs, cost=CPU, **options):
    names, traces = [j.name for j in jobs], [_trace.trace(j) for j in jobs]
    return _align.align(names, traces, cost, **options)


def parts(plan):
    """Return which species share launches with one another."""
    return components(len(plan.species), [node.species for node in plan.nodes])


def dot(jobs, rows, contracted, columns, why_solo=""):
    """Return the launch of one dense layer of some jobs, at one row."""
    num_values = rows * contracted + contracted * columns + rows * columns
    return Launch(
        primitive="dot_general",
        jobs=tuple(jobs),
        shape=(rows, columns),
        waste=0.0,
        flops=2.0 * rows * contracted * columns * len(jobs),
        num_bytes=4.0 * num_values * len(jobs),
        why_solo=why_solo,
    )


def test_equal_jobs_share_every_launch():
    plan = align([job("a", 4, 8, 2), job("b", 4, 8, 2), job("c", 4, 8, 2)])
    assert plan.names == ("a", "b", "c")
    assert [one.members for one in plan.species] == [(0, 1, 2)]
    assert plan.launches == (dot("abc", 1, 4, 8), dot("abc", 1, 8, 2))
    assert (plan.num_launches, plan.num_launches_alone, plan.num_solo) == (2, 6, 0)
    assert plan.waste == 0.0 and plan.cost is CPU


def test_members_of_a_kind_find_each_other_among_others():
    plan = align([job("a", 4, 2), job("b", 4, 3, 2), job("c", 4, 2)], max_waste=0)
    assert [one.members for one in plan.species] == [(0, 2), (1,)]
    assert dot("ac", 1, 4, 2) in plan.launches
    assert (plan.num_launches, plan.num_launches_alone, plan.num_solo) == (3, 4, 2)


def test_unlike_jobs_share_the_launches_that_cost_less_together():
    jobs = [job("a", 4, 2), job("b", 4, 8, 2), job("c", 4, 2)]
    plan = align(jobs)
    assert [one.members for one in plan.species] == [(0, 2), (1,)]
    last = Launch(
        primitive="dot_general",
        jobs=("a", "b", "c"),
        shape=(1, 2),
        waste=3 * 8 / (4 + 8 + 4) - 1,
        flops=3 * 2.0 * 8 * 2,
        num_bytes=3 * 4.0 * (8 + 8 * 2 + 2),
    )
    assert plan.launches == (dot("b", 1, 4, 8, "no partner is left"), last)
    assert (plan.num_launches, plan.num_launches_alone, plan.num_solo) == (2, 4, 1)
    free = dataclasses.replace(CPU, launch_s=1e-12)
    assert align(jobs, free).launches == (
        dot("ac", 1, 4, 2),
        dot("b", 1, 4, 8, "cheaper apart"),
        dot("b", 1, 8, 2, "cheaper apart"),
    )


def test_sharing_that_saves_next_to_nothing_is_left_alone():
    jobs = [job("a", 2000, 2000, 2), job("b", 2000, 2000, 3)]
    plan = align(jobs)
    assert {x.why_solo for x in plan.launches} == {"cheaper apart"}
    assert all(len(node.members) == 1 for node in plan.nodes)
    slow = dataclasses.replace(CPU, launch_s=1e-4)  # as much as 1 MB, of 32 in all
    assert align(jobs, slow).num_launches == 2
    # Weights that are kept once pay for more than a launch: they are read once, too.
    shared = align(jobs, shares=[("trunk", None)] * 2)
    assert [len(x.jobs) for x in shared.launches] == [2, 2]


def test_jobs_that_share_are_not_parted_for_those_that_hardly_do():
    large = [job("a", 2000, 2000, 2), job("b", 2000, 2000, 3)]
    plan = align([*large, job("c", 4, 8, 2), job("d", 4, 9, 2)])
    assert parts(plan) == ((0,), (1,), (2, 3))
    assert [x.jobs for x in plan.launches[:2]] == [("c", "d")] * 2


def test_where_launches_overlap_a_job_that_shares_little_goes_beside_the_others():
    def align_gpu(jobs, is_concurrent=True, **options):
        return align(jobs, RECORDS["h200"], is_concurrent=is_concurrent, **options)

    deep = [4, 8] * 13
    jobs = [job("a", *deep), job("b", *deep[:-1]), job("c", *deep[:9])]
    wide = [np.ones((4, 8), "f"), *[np.ones((8, 8), jnp.bfloat16)] * 17]
    for num_alike in (0, 8, 17):  # those of the other type find no partner
        params = [*wide[:1], *(w.astype("f") for w in wide[1:][:num_alike])]
        other = stfuse.Job("d", dense, params + wide[1 + num_alike :], jobs[0].example)
        beside = ((0,), (1, 2, 3)) if num_alike < 17 else ((0, 1, 2, 3),)
        assert parts(align_gpu([other, *jobs])) == beside
    # Eight of its own, or weights that are kept once: it stays in the sequence.
    few = stfuse.Job("d", dense, wide[:1] + wide[-8:], jobs[0].example)
    assert parts(align_gpu([few, *jobs])) == ((0, 1, 2, 3),)
    other = stfuse.Job("d", dense, wide, jobs[0].example)
    marks = [("trunk", *[None] * (len(x.params) - 1)) for x in (other, *jobs)]
    assert parts(align_gpu([other, *jobs], shares=marks)) == ((0, 1, 2, 3),)
    plan = align_gpu([other, *jobs], is_concurrent=False)
    assert parts(plan) == ((0, 1, 2, 3),)


def test_a_table_that_unlike_jobs_read_is_kept_once_where_launches_overlap():
    table, ids = np.ones((100, 8), "f"), np.zeros((1, 5), np.int32)

    def reader(name, dtype, num):
        def apply_fn(params, ids):
            return dense(params["w"], params["table"][ids].astype(dtype))

        params = {"table": table, "w": [np.ones((8, 8), dtype)] * num}
        return stfuse.Job(name, apply_fn, params, ids)

    jobs = [reader("a", np.float32, 20), reader("b", jnp.bfloat16, 14)]
    plan = stfuse.fuse(jobs, cost="h200", lowering="heuristic").plan
    assert plan.param_bytes_alone - plan.param_bytes >= table.nbytes
    assert not any(len(x.jobs) > 1 for x in plan.launches)


def test_a_lone_job_has_no_solo_launches():
    plan = align([job("a", 4, 8, 2)])
    assert (plan.num_launches, plan.num_launches_alone, plan.num_solo) == (2, 2, 0)


def test_launches_that_serve_one_job_of_several_are_solo():
    plan = align([job("a", 4, 2), stfuse.Job("b", jnp.multiply, 2.0, np.ones((1, 3)))])
    assert plan.launches == (dot("a", 1, 4, 2, "no other job has one"),)
    assert plan.num_solo == 1


def launch(name, jobs, shape, waste, flops, lowering):
    return Launch(name, jobs, shape, waste, flops, 0.0, lowering)


TYPED = Plan(
    names=("a", "b", "c", "d", "e"),
    species=(),
    launches=(
        launch("dot_general", ("a", "b"), (1, 128), 0.0, 100.0, "native"),
        launch(
            "conv_general_dilated", ("a", "b", "c", "d"), (8, 8), 0.5, 300.0, "patches"
        ),
        launch("sort", ("e",), (), 0.0, 100.0, "native"),
    ),
    cost=CPU,
)


def test_a_plan_prints_as_a_table():
    assert str(TYPED).split("\n") == [
        "#  launch                jobs             shape   waste  lowering",
        "0  dot_general           2: a, b          1x128   0.00   native",
        "1  conv_general_dilated  4: a, b, c, ...  8x8     0.50   patches",
        "2  sort                  1: e             scalar  0.00   native",
        "5 jobs of 0 species: 7 heavy launches alone, 3 fused, 1 of them solo; "
        "waste 0.25",
    ]


def test_the_waste_of_a_plan_weighs_launches_by_their_work():
    assert TYPED.waste == 500 / (100 + 200 + 100) - 1
    assert Plan((), (), (), CPU).waste == 0.0


@given(st.lists(st.sampled_from(CASES[:12]), min_size=1, max_size=9))
def test_every_job_is_in_one_species_and_in_each_of_its_launches_once(kinds):
    names = [f"job{i}" for i in range(len(kinds))]
    traces = [_trace.trace(cases.job(kind, i % 2)) for i, kind in enumerate(kinds)]
    plan = _align.align(names, traces, CPU)
    members = sorted(m for one in plan.species for m in one.members)
    assert members == list(range(len(kinds)))
    for name, trace in zip(names, traces, strict=True):
        own = [op.name for op in trace.ops if op.is_heavy]
        shared = [one.primitive for one in plan.launches if name in one.jobs]
        assert shared == own
    true = sum(op.flops for trace in traces for op in trace.ops if op.is_heavy)
    done = sum(one.flops for one in plan.launches)
    assert done == pytest.approx(true * (1 + plan.waste))
    assert plan == _align.align(names, traces, CPU)


def test_the_plan_of_a_fused_step_says_how_each_launch_is_computed():
    conv = [cases.job(cases.BY_NAME["conv"], seed) for seed in range(3)]
    auto = stfuse.fuse(conv, cost="h200").plan
    native = stfuse.fuse(conv, cost="h200", lowering="native").plan
    assert [one.lowering for one in auto.launches] == ["patches"]
    assert [one.lowering for one in native.launches] == ["native"]


def convolve_and_sort(kernel, x):
    return jnp.sort(lax.conv_general_dilated(x, kernel, (1, 1), "SAME"))


def test_pairs_compared_at_once_save_what_each_of_them_does(monkeypatch):
    saved, primitives = _merge._saved_s, set()

    def checked(targets, drafts, a, b, terms):
        found = saved(targets, drafts, a, b, terms)
        for gain_s, x, y in zip(found, a, b, strict=True):
            (s,) = drafts[y].members
            assert gain_s == _merge._joint(targets[x], drafts[y], s, terms).gain_s
            primitives.add(drafts[y].op.name)
        return found

    monkeypatch.setattr(_merge, "_saved_s", checked)
    jobs = [job("a", 4, 8, 2), job("b", 5, 3, 6), job("c", 4, 8, 2), job("d", 7, 5)]
    for name, channels in {"e": 3, "f": 5, "g": 5, "h": 7}.items():
        kernel, x = np.ones((channels, 2, 3, 3), "f"), np.ones((1, 2, channels, 8), "f")
        jobs.append(stfuse.Job(name, convolve_and_sort, kernel, x))
    for cost in RECORDS.values():
        for max_waste in (None, 0.2):
            align(jobs, cost, max_waste=max_waste)
    assert primitives >= {"dot_general", "conv_general_dilated", "sort"}
