"""The whole step in several ways: all are right, and the fastest is used."""

import jax
import numpy as np
import pytest

import stfuse
from stfuse._lower import _measure
from tests import cases
from tests.cases import BY_NAME, CASES, alone, assert_same

ROWS = (3, 1, 2)


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
