"""The promise: whatever the other jobs are, send, or do, a job answers as if alone."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import stfuse
from tests import cases
from tests.cases import BY_NAME, CASES, alone, assert_bitwise, assert_same

# Rows of each job's request, by number of jobs.
ROWS = {3: (3, 1, 2), 5: (8, 1, 3, 2, 5)}
over_cases = pytest.mark.parametrize("case", CASES, ids=str)


def check(fused, bank, requests, params=None):
    """Check every answer of a call against the job's own."""
    outs = fused(bank, requests)
    assert set(outs) == set(requests)
    for name, x in requests.items():
        expected = alone(fused.jobs[name], x, (params or {}).get(name))
        assert_same(outs[name], expected, BY_NAME[name.split(".")[0]])


@over_cases
@pytest.mark.parametrize("num_jobs", [3, 5])
def test_jobs_of_one_kind_answer_as_each_alone(case, num_jobs):
    fused = cases.group(case, num_jobs)
    check(fused, fused.pack(), cases.requests(case, fused, ROWS[num_jobs]))


@over_cases
def test_a_job_given_twice_under_two_names_answers_twice(case):
    fused = stfuse.fuse([case.job(f"{case.name}.{i}") for i in "ab"], cost="cpu")
    check(fused, fused.pack(), cases.requests(case, fused, (1, 2)))


@over_cases
def test_a_call_that_names_one_job_of_three_answers_for_it(case):
    fused = cases.group(case, 3)
    name = list(fused.jobs)[1]
    check(fused, fused.pack(), {name: case.inputs(1, rows=3)})


@pytest.mark.parametrize("i", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_job_of_one_kind_beside_two_of_another_answers_as_alone(i):
    kinds = CASES[i], CASES[(i + 7) % len(CASES)], CASES[i]
    jobs = [cases.job(kind, seed) for kind, seed in zip(kinds, (0, 0, 1), strict=True)]
    fused = stfuse.fuse(jobs, cost="cpu")
    requests = {
        job.name: kind.inputs(rows, rows)
        for job, kind, rows in zip(jobs, kinds, (1, 3, 2), strict=True)
    }
    check(fused, fused.pack(), requests)


@functools.cache
def everyone():
    return stfuse.fuse([cases.job(case, 1) for case in CASES], cost="cpu")


def test_all_kinds_in_one_fuse_answer_as_each_alone():
    fused = everyone()
    assert len(fused.jobs) >= 30
    requests = {
        f"{case.name}.1": case.inputs(i, rows=1 + i % 4) for i, case in enumerate(CASES)
    }
    check(fused, fused.pack(), requests)
    some = dict(itertools.islice(requests.items(), 0, None, 5))
    check(fused, fused.pack(), some)


@over_cases
def test_swap_changes_one_job_and_keeps_the_old_bank(case):
    fused = cases.group(case, 3)
    bank, names = fused.pack(), list(fused.jobs)
    requests = cases.requests(case, fused, ROWS[3])
    before = fused(bank, requests)
    new_params = cases.job(case, 4).params
    swapped = fused.swap(bank, names[1], new_params)
    check(fused, swapped, requests, {names[1]: new_params})
    assert_bitwise(fused(bank, requests), before)
    back = fused.swap(swapped, names[1], fused.jobs[names[1]].params)
    assert_bitwise(fused(back, requests), before)


@over_cases
def test_pack_takes_other_params_for_the_jobs_it_names(case):
    fused = cases.group(case, 3)
    name = list(fused.jobs)[2]
    params = {name: cases.job(case, 4).params}
    bank = fused.pack(params)
    check(fused, bank, cases.requests(case, fused, ROWS[3]), params)


@pytest.mark.parametrize("name", ["mlp", "conv", "python_scalars"])
def test_swap_of_a_job_that_shared_all_its_leaves_leaves_the_others(name):
    case = BY_NAME[name]
    fused = stfuse.fuse([case.job(f"{name}.{i}") for i in "abc"], cost="cpu")
    requests = cases.requests(case, fused, (1, 2, 1))
    new_params = cases.job(case, 4).params
    bank = fused.swap(fused.pack(), f"{name}.b", new_params)
    check(fused, bank, requests, {f"{name}.b": new_params})


def test_pack_makes_a_bank_for_jobs_that_were_only_shapes():
    case = BY_NAME["mlp"]
    apply_fn, params = case.make(0)
    specs = jax.eval_shape(lambda: params)
    job = stfuse.Job("mlp.0", apply_fn, specs, case.inputs(0, 1))
    fused = stfuse.fuse([job], cost="cpu")
    with pytest.raises(stfuse.JobError, match="only a shape"):
        fused.pack()
    check(
        fused,
        fused.pack({"mlp.0": params}),
        {"mlp.0": case.inputs(1, 2)},
        {"mlp.0": params},
    )


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm", "attention"])
def test_an_answer_stays_when_other_jobs_join_or_leave(name):
    case = BY_NAME[name]
    x = case.inputs(0, 3)
    answers = []
    for num_jobs in (1, 3, 5):
        fused = cases.group(case, num_jobs)
        answers.append(fused(fused.pack(), {f"{name}.0": x})[f"{name}.0"])
    for answer in answers[1:]:
        assert_same(answer, answers[0], case)


def test_stack_step_and_split_are_the_call():
    case = BY_NAME["nested_trees"]
    fused = cases.group(case, 3)
    bank, requests = fused.pack(), cases.requests(case, fused, ROWS[3])
    stacked = fused.stack(requests)
    assert_bitwise(fused.split(fused.step(bank, stacked)), fused(bank, requests))


def test_answers_are_arrays_of_the_callers_own():
    case = BY_NAME["mlp"]
    fused = cases.group(case, 2)
    outs = fused(fused.pack(), cases.requests(case, fused, (1, 2)))
    a, b = outs.values()
    kept = b.copy()
    assert type(a) is np.ndarray and a.flags.writeable and a.flags.owndata
    a[:] = 0
    np.testing.assert_array_equal(b, kept)


MIXED = ("mlp", "conv", "embedding", "nested_trees", "lstm", "bool_input", "remat")


@functools.cache
def mixed():
    jobs = [cases.job(BY_NAME[name], seed) for name in MIXED for seed in (0, 1)]
    return stfuse.fuse(jobs, cost="cpu")


def mixed_requests(seed, rows=2):
    return {
        name: BY_NAME[name.split(".")[0]].inputs(seed + i, rows)
        for i, name in enumerate(mixed().jobs)
    }


def assert_same_by_name(outs, expected):
    for name in expected:
        assert_same(outs[name], expected[name], BY_NAME[name.split(".")[0]])


def alone_by_name(requests):
    return {name: alone(mixed().jobs[name], x) for name, x in requests.items()}


def stacked_trees(trees):
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)


def test_a_call_works_inside_jit():
    fused, requests = mixed(), mixed_requests(0)
    outs = jax.jit(fused.__call__)(fused.pack(), requests)
    assert_same_by_name(outs, alone_by_name(requests))


def test_a_call_works_inside_jit_for_some_jobs_of_unequal_rows():
    fused = mixed()
    some = {
        "lstm.1": BY_NAME["lstm"].inputs(0, 3),
        "mlp.0": BY_NAME["mlp"].inputs(0, 1),
    }
    outs = jax.jit(fused.__call__)(fused.pack(), some)
    assert_same_by_name(outs, alone_by_name(some))


def test_a_call_works_inside_scan():
    fused = mixed()
    turns = [mixed_requests(100 * t) for t in range(3)]
    bank = fused.pack()
    _, outs = jax.jit(
        lambda xs: lax.scan(lambda carry, x: (carry, fused(bank, x)), None, xs)
    )(stacked_trees(turns))
    expected = stacked_trees([alone_by_name(turn) for turn in turns])
    assert_same_by_name(outs, expected)


def test_a_call_works_under_vmap_over_inputs():
    fused = mixed()
    lanes = [mixed_requests(100 * t) for t in range(3)]
    bank = fused.pack()
    outs = jax.jit(jax.vmap(lambda x: fused(bank, x)))(stacked_trees(lanes))
    assert_same_by_name(outs, stacked_trees([alone_by_name(lane) for lane in lanes]))


def test_a_call_works_inside_while_loop_as_a_decoder_does():
    case = BY_NAME["remat"]  # its outputs look like its inputs
    fused = cases.group(case, 3)
    bank, x = fused.pack(), cases.requests(case, fused, (2, 2, 2))

    def turn(state):
        t, y = state
        return t + 1, fused(bank, y)

    _, outs = jax.jit(
        lambda x: lax.while_loop(lambda state: state[0] < 4, turn, (0, x))
    )(jax.tree.map(jnp.asarray, x))
    for name, y in x.items():
        for _ in range(4):
            y = alone(fused.jobs[name], y)
        assert_same(outs[name], y, case)


def test_the_stacked_form_stays_on_the_device_through_a_loop():
    case = BY_NAME["remat"]
    fused = cases.group(case, 3)
    bank = fused.pack()
    stacked = fused.stack(cases.requests(case, fused, (2, 2, 2)))
    outs = fused.step(bank, stacked)
    again = fused.step(bank, dataclasses.replace(stacked, inputs=outs.leaves))
    for name, y in fused.split(again).items():
        twice = alone(fused.jobs[name], fused.split(outs)[name])
        assert_same(y, twice, case)


CONVS = ("cnn", "conv", "depthwise_conv", "grouped_conv", "transposed_conv")


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("lowering", "cost"), [("native", "cpu"), ("auto", "h200")])
def test_every_lowering_and_cost_record_give_the_same_answers(name, lowering, cost):
    case = BY_NAME[name]
    jobs = [cases.job(case, seed) for seed in range(3)]
    fused = stfuse.fuse(jobs, lowering=lowering, cost=cost)
    check(fused, fused.pack(), cases.requests(case, fused, ROWS[3]))


def test_a_cost_measured_on_the_live_device_gives_the_same_answers():
    case = BY_NAME["cnn"]
    fused = stfuse.fuse([cases.job(case, seed) for seed in range(3)])
    assert fused.plan.cost.source == jax.devices()[0].platform
    check(fused, fused.pack(), cases.requests(case, fused, ROWS[3]))


def test_inputs_placed_on_a_mesh_give_the_same_answers():
    mesh = jax.make_mesh(
        (1,),
        ("rows",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:1],
    )
    placed = jax.NamedSharding(mesh, jax.P("rows"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    case = BY_NAME["mlp"]
    fused = cases.group(case, 3)
    requests = cases.requests(case, fused, ROWS[3])
    bank = jax.device_put(fused.pack(), everywhere)
    on_mesh = jax.device_put(requests, placed)
    expected = {name: alone(fused.jobs[name], x) for name, x in requests.items()}
    for call in (fused.__call__, jax.jit(fused.__call__)):
        outs = call(bank, on_mesh)
        for name in requests:
            assert_same(outs[name], expected[name], case)
