"""The whole step in several ways: all are right, and the fastest is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from stfuse._lower import _measure
from tests import cases
from tests.cases import BY_NAME, CASES, alone, assert_same

ROWS = (3, 1, 2)
OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


def run(fused, mode, bank, requests):
    """Return the answers of one way to compute the step."""
    stacked = fused.stack(requests)
    leaves = fused._step.jitted(mode)(bank.stacks, stacked.slots, stacked.inputs)
    return fused.split(stfuse._stacked.StackedOutputs(leaves, stacked.places))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_job_apart_answers_as_alone(case):
    fused = cases.group(case, 3)
    requests = cases.requests(case, fused, ROWS)
    for name, out in run(fused, "apart", fused.pack(), requests).items():
        assert_same(out, alone(fused.jobs[name], requests[name]), case)


@pytest.mark.parametrize("i", range(0, len(CASES), 3), ids=str)
def test_unlike_jobs_apart_answer_as_alone(i):
    kinds = CASES[i], CASES[(i + 7) % len(CASES)], CASES[i]
    jobs = [cases.job(kind, seed) for kind, seed in zip(kinds, (0, 0, 1), strict=True)]
    fused = stfuse.fuse(jobs, cost="cpu")
    requests = {
        job.name: kind.inputs(rows, rows)
        for job, kind, rows in zip(jobs, kinds, ROWS, strict=True)
    }
    for name, out in run(fused, "apart", fused.pack(), requests).items():
        expected = alone(fused.jobs[name], requests[name])
        assert_same(out, expected, BY_NAME[name.split(".")[0]])


def test_a_subset_of_shared_launches_runs_apart():
    rng = np.random.default_rng(0)
    jobs = [
        stfuse.Job(
            name,
            lambda w, x: x @ w,
            rng.normal(size=(3, width)).astype("f"),
            np.ones((1, 3), "f"),
        )
        for name, width in zip("abcd", (2, 4, 2, 5), strict=True)
    ]
    fused = stfuse.fuse(jobs, cost="h200")
    assert fused.plan.num_launches == 1
    bank = fused.pack()
    requests = {name: rng.normal(size=(2, 3)).astype("f") for name in "cb"}
    outs = run(fused, "apart", bank, requests)
    for name, x in requests.items():
        np.testing.assert_allclose(outs[name], x @ fused.jobs[name].params, rtol=1e-5)


@pytest.mark.parametrize("wins", ["auto", "native", "apart"])
def test_the_fastest_way_to_compute_the_step_is_used(live, wins):
    case = BY_NAME["conv"]
    fused = stfuse.fuse([cases.job(case, seed) for seed in range(3)], cost="cpu")
    requests = cases.requests(case, fused, ROWS)
    live.setattr(_measure, "is_worth", lambda *_: False)  # only whole steps
    order, asked = ["auto", "native", "apart"], []

    def best_s(run, limit_s=None):
        jax.block_until_ready(run())
        asked.append(run)
        return 1.0 if order[len(asked) - 1] == wins else 2.0

    live.setattr(_measure, "best_s", best_s)
    bank = fused.pack()
    for _ in range(2):
        outs = fused(bank, requests)
    assert len(asked) == 3
    (step,) = fused._step._chosen.values()
    assert step is fused._step.jitted(wins)
    for name, out in outs.items():
        assert_same(out, alone(fused.jobs[name], requests[name]), case)


def test_a_step_that_is_told_what_to_do_is_not_measured(live):
    live.setattr(_measure, "best_s", lambda *_: pytest.fail("measured"))
    for lowering in ("heuristic", "native"):
        jobs = [cases.job(BY_NAME["conv"], seed) for seed in (0, 1)]
        fused = stfuse.fuse(jobs, cost="cpu", lowering=lowering)
        bank = fused.pack()
        fused(bank, cases.requests(BY_NAME["conv"], fused, (1, 1)))


def unlike():
    """Return the fused step of two unlike jobs as for a GPU, and their requests."""
    jobs = [cases.job(BY_NAME[name], 0) for name in ("conv", "mlp")]
    fused = stfuse.fuse(jobs, cost="h200", lowering="heuristic")
    requests = {job.name: BY_NAME[job.name.split(".")[0]].inputs(0, 2) for job in jobs}
    return fused, requests


def test_xla_is_told_that_unlike_jobs_run_beside_each_other_on_a_gpu():
    assert unlike()[0]._step._options == OPTIONS
    jobs = [cases.job(BY_NAME["mlp"], seed) for seed in (0, 1)]
    assert not stfuse.fuse(jobs, cost="h200")._step._options
    jobs[1] = cases.job(BY_NAME["conv"], 0)
    assert not stfuse.fuse(jobs, cost="cpu")._step._options
    with pytest.raises(Exception, match="No such compile option"):  # so it has ours
        jax.jit(abs).lower(1.0).compile({f"{key}S": v for key, v in OPTIONS.items()})


def test_a_step_with_options_is_a_part_of_the_program_that_calls_it():
    fused, requests = unlike()
    bank = fused.pack()

    def check(outs):
        for name, out in outs.items():
            expected = alone(fused.jobs[name], requests[name])
            assert_same(out, expected, BY_NAME[name.split(".")[0]])

    def call(requests=requests):
        return fused(bank, requests)

    check(call())
    (compiled,) = fused._step._chosen.values()
    assert isinstance(compiled, jax.stages.Compiled)
    check(jax.jit(call)(requests))
    check(jax.jit(call)())
    twice = jax.tree.map(lambda x: np.stack([x, x]), requests)
    for i in (0, 1):
        check(jax.tree.map(lambda x, i=i: x[i], jax.vmap(call)(twice)))
    total = jax.grad(lambda bank: sum(map(np.sum, fused(bank, requests).values())))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(total(bank)))
    check(call())
    assert len(fused._step._chosen) == 1
    with jax.default_matmul_precision("float32"):  # another program
        check(call())
    assert len(fused._step._chosen) == 2
    jaxpr = jax.make_jaxpr(lambda: fused.step(bank, fused.stack(requests)).leaves)()
    assert "dot_general" in str(jaxpr)  # though all it reads is known


def test_a_step_with_options_is_compiled_for_the_weights_it_is_given():
    shared = np.eye(3, dtype=np.float32)
    jobs = [
        stfuse.Job(name, lambda w, x: jnp.log(x @ w["a"] @ w["b"]), w, np.ones((1, 3)))
        for name, w in (
            ("a", {"a": shared, "b": np.ones((3, 2), np.float32)}),
            ("b", {"a": shared, "b": np.ones((3, 4), np.float32)}),
        )
    ]
    fused = stfuse.fuse(jobs, cost="h200")
    bank = fused.pack()
    other = fused.swap(bank, "a", {"a": 2 * shared, "b": jobs[0].params["b"]})
    requests = {name: np.ones((2, 3), np.float32) for name in "ab"}
    for _ in range(2):
        for own, expected in ((bank, 3.0), (other, 6.0)):
            outs = fused(own, requests)
            np.testing.assert_allclose(outs["a"], np.log(expected) + np.zeros((2, 2)))
            np.testing.assert_allclose(outs["b"], np.log(3.0) + np.zeros((2, 4)))
    steps = list(fused._step._chosen.values())
    assert len(steps) == 2 and all(isinstance(x, jax.stages.Compiled) for x in steps)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="invalid"):
        fused(bank, {"a": -requests["a"]})
