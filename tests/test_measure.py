"""The chooser: what it measures, what it remembers, and when it leaves off.

Times are made up: a test that timed would fail on a busy machine.
"""

import jax
import numpy as np
import pytest
from jax import lax

import stfuse
from stfuse import _lower, _trace
from stfuse._cost import RECORDS
from stfuse._lower import _measure, _store
from tests import cases
from tests.cases import BY_NAME


class Clock:
    """Says how long each way takes, after having run it."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def best_s(self, run, limit_s=None):
        jax.block_until_ready(run())
        self.asked.append(run)
        return self.seconds[len(self.asked) - 1]


def ask(live, seconds, guess="a", question="question"):
    """Return the pick, and whether anything was measured for it."""
    made = []

    def runs():
        made.append(True)
        return {name: (lambda name=name: name) for name in seconds}

    def best_s(run, limit_s=None):
        found = seconds[run()]
        if isinstance(found, Exception):
            raise found
        return found

    live.setattr(_measure, "best_s", best_s)
    return _measure.pick(question, runs, guess), bool(made)


def test_the_fastest_is_picked_unless_the_guess_is_as_good(live):
    assert ask(live, {"a": 3.0, "b": 1.0, "c": 2.0}) == ("b", True)
    assert ask(live, {"a": 1.0, "b": 0.99}, question="within noise") == ("a", True)
    assert ask(live, {"a": 1.0, "b": 2.0}, "b", "the other guess") == ("a", True)


def test_what_was_measured_once_is_not_measured_again(live):
    assert ask(live, {"a": 3.0, "b": 1.0}) == ("b", True)
    assert ask(live, {"a": 1.0, "b": 3.0}) == ("b", False)
    _measure.forget()  # as a new process would have
    assert ask(live, {"a": 1.0, "b": 3.0}) == ("b", False)
    live.setenv("STFUSE_CACHE_DIR", "")
    _measure.forget()
    assert ask(live, {"a": 1.0, "b": 3.0}) == ("a", True)


def test_without_a_budget_the_guess_stands(live):
    live.setenv("STFUSE_MEASURE_BUDGET_S", "0")
    assert ask(live, {"a": 3.0, "b": 1.0}) == ("a", False)
    live.setenv("STFUSE_MEASURE_BUDGET_S", "1000")
    assert ask(live, {"a": 3.0, "b": 1.0}) == ("b", True)


def test_the_budget_is_spent(live):
    live.setenv("STFUSE_MEASURE_BUDGET_S", "1e-9")
    # The guess is measured first; then time is up.
    assert ask(live, {"b": 1.0, "a": 3.0}) == ("a", True)
    assert _measure.budget_s() <= 0
    assert ask(live, {"b": 1.0, "a": 3.0}, question="another") == ("a", False)
    _measure.forget()  # half an answer is not kept for processes with more time
    live.setenv("STFUSE_MEASURE_BUDGET_S", "1000")
    assert ask(live, {"b": 1.0, "a": 3.0}) == ("b", True)


def test_no_memory_to_measure_with_is_no_error(live):
    def runs():
        raise MemoryError("for the operands")

    assert _measure.pick("question", runs, "a") == "a"
    assert _store.load("question") is None


def test_a_way_that_fails_is_out(live):
    assert ask(live, {"a": 3.0, "b": RuntimeError("no such kernel")}) == ("a", True)
    _measure.forget()  # nor is what was measured without it kept on the disk
    assert ask(live, {"a": 3.0, "b": 1.0}) == ("b", True)
    failed = {"a": RuntimeError("no such kernel"), "b": 1.0}
    assert ask(live, failed, question="the guess itself") == ("b", True)


def test_answers_are_for_one_device_one_version_and_one_precision(live):
    saved = []
    live.setattr(_store, "save", lambda question, seconds: saved.append(question))
    ask(live, {"a": 1.0, "b": 2.0})
    with jax.default_matmul_precision("bfloat16"):
        ask(live, {"a": 1.0, "b": 2.0})
    assert len(set(saved)) == 2
    kind = jax.devices()[0].device_kind
    assert all(kind in text and jax.__version__ in text for text in saved)


def test_only_plans_for_the_device_at_hand_are_measured():
    assert _measure.is_live(RECORDS["cpu"]) == (jax.default_backend() == "cpu")
    assert _measure.is_live(RECORDS["h200"]) == (jax.default_backend() == "gpu")
    assert not _measure.is_live(stfuse.Cost(1e-6, 1e10, 1e11))


def conv_op():
    ops = _trace.trace(cases.job(BY_NAME["conv"], 0)).ops
    return next(op for op in ops if op.is_heavy)


@pytest.mark.parametrize("wins", ["native", "unrolled", "patches", "shifted"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_chooser_takes_what_was_fastest(live, wins, rows):
    op = conv_op()
    names = _lower.candidates(op, (True, True), rows, 4)
    guess = "patches" if jax.default_backend() == "cpu" else "native"
    order = sorted(names, key=lambda name: name != guess)
    clock = Clock([1.0 if name == wins else 2.0 for name in order])
    live.setattr(_measure, "best_s", clock.best_s)
    size = {"num_slots": 4, "rows": rows, "cost": RECORDS["cpu"]}
    found = _lower.choose(op, (True, True), **size, mode="auto")
    assert found == wins
    assert len(clock.asked) == len(names)
    assert _lower.choose(op, (True, True), **size, mode="heuristic") == guess
    assert _lower.choose(op, (True, True), **size, mode="known") == wins
    _measure.forget()
    live.setenv("STFUSE_CACHE_DIR", "")
    assert _lower.choose(op, (True, True), **size, mode="known") == guess
    assert len(clock.asked) == len(names)


@pytest.mark.parametrize("flags", [(True, True), (False, True)])
def test_every_way_can_be_measured_whatever_the_slots_share(live, flags):
    op, shapes = conv_op(), []

    def best_s(run, limit_s=None):
        shapes.extend(y.shape for y in run())
        return 1.0

    live.setattr(_measure, "best_s", best_s)
    size = {"num_slots": 4, "rows": 3, "cost": RECORDS[jax.default_backend()]}
    _lower.choose(op, flags, **size, mode="auto")
    assert len(shapes) >= len(_lower.candidates(op, flags, 3, 4))
    assert set(shapes) == {(4, 3, *op.specs[0].shape)}


def test_with_measuring_off_nothing_is_traced_to_be_compared(live):
    live.setenv("STFUSE_MEASURE_BUDGET_S", "0")
    fused = stfuse.fuse([cases.job(BY_NAME["conv"], s) for s in (0, 1)], cost="cpu")
    fused(fused.pack(), cases.requests(BY_NAME["conv"], fused, (1, 1)))
    assert list(fused._step._steps) == ["auto"]


def test_a_step_is_measured_while_it_is_traced(live):
    rng = np.random.default_rng(0)

    def apply_fn(w, x):
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    jobs = [
        stfuse.Job(
            name,
            apply_fn,
            rng.normal(size=(3, 3, 2, 4)).astype("f"),
            np.ones((1, 5, 5, 2), "f"),
        )
        for name in "ab"
    ]
    asked = []

    def best_s(run, limit_s=None):
        jax.block_until_ready(run())
        asked.append(run)
        return 1.0 / len(asked)  # the last one wins

    live.setattr(_measure, "best_s", best_s)
    fused = stfuse.fuse(jobs, cost="cpu")
    bank = fused.pack()
    inputs = {name: rng.normal(size=(2, 5, 5, 2)).astype("f") for name in "ab"}
    outs = jax.jit(fused)(bank, inputs)
    num_ways = len(asked)
    assert num_ways >= 4
    again = fused(bank, inputs)  # outside, the whole step is measured, too
    assert len(asked) > num_ways
    for name in "ab":
        alone = apply_fn(fused.jobs[name].params, inputs[name])
        np.testing.assert_allclose(outs[name], alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(again[name], alone, rtol=1e-5, atol=1e-5)
