"""What is compiled stays compiled, and what is forgotten is freed."""

import contextlib
import dataclasses
import gc
import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import stfuse
from stfuse import _trace
from tests import cases, functions
from tests.cases import BY_NAME

ROWS = (3, 1, 2)


@contextlib.contextmanager
def count_compiles():
    """Yield a list that gets a line for every program that JAX compiles."""
    seen = []

    class Listener(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("Compiling"):
                seen.append(record.getMessage())

    logger, listener = logging.getLogger("jax"), Listener()
    was_heard = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False  # the log itself is not wanted
    try:
        with jax.log_compiles():
            yield seen
    finally:
        logger.removeHandler(listener)
        logger.propagate = was_heard


def fresh(num_jobs=3, name="mlp"):
    """Return jobs and their fused step that nobody has compiled for."""
    case = BY_NAME[name]
    fused = stfuse.fuse([cases.job(case, i) for i in range(num_jobs)], cost="cpu")
    return case, fused, fused.pack(), cases.requests(case, fused, ROWS[:num_jobs])


def test_the_first_call_compiles_one_program():
    _, fused, bank, requests = fresh()
    with count_compiles() as compiled:
        fused(bank, requests)
    assert len(compiled) == 1
    assert fused._step.jitted("auto")._cache_size() == 1


@pytest.mark.parametrize("name", ["mlp", "cnn", "nested_trees", "python_scalars"])
def test_a_second_call_of_the_same_shapes_compiles_nothing(name):
    case, fused, bank, requests = fresh(name=name)
    fused(bank, requests)
    other_values = {n: case.inputs(40 + i, ROWS[i]) for i, n in enumerate(requests)}
    with count_compiles() as compiled:
        fused(bank, requests)
        fused(bank, other_values)
        fused(fused.pack(), dict(reversed(requests.items())))
    assert compiled == []
    assert fused._step.jitted("auto")._cache_size() == 1


def test_rows_of_one_bucket_share_a_program():
    case, fused, bank, requests = fresh()
    fused(bank, requests)  # three rows and four are one bucket
    first = next(iter(requests))
    with count_compiles() as compiled:
        fused(bank, {**requests, first: case.inputs(0, 4)})
    assert compiled == []
    with count_compiles() as compiled:
        fused(bank, {**requests, first: case.inputs(0, 5)})
    assert len(compiled) == 1


def test_a_subset_of_one_bucket_shares_a_program_whoever_is_named():
    case, fused, bank, _ = fresh()
    a, b, c = fused.jobs
    fused(bank, {a: case.inputs(0, 2), b: case.inputs(1, 2)})
    with count_compiles() as compiled:
        fused(bank, {c: case.inputs(0, 2), b: case.inputs(1, 1)})
        fused(bank, {a: case.inputs(0, 1), c: case.inputs(1, 2)})
    assert compiled == []


def test_subsets_of_three_and_of_four_share_a_program():
    case = BY_NAME["mlp"]
    fused = stfuse.fuse([cases.job(case, i) for i in range(6)], cost="cpu")
    bank, x = fused.pack(), case.inputs(0, 1)
    names = list(fused.jobs)
    fused(bank, dict.fromkeys(names[:3], x))
    with count_compiles() as compiled:
        fused(bank, dict.fromkeys(names[1:5], x))
        fused(bank, dict.fromkeys(names[3:], x))
    assert compiled == []


def test_a_call_after_swap_compiles_nothing():
    case, fused, bank, requests = fresh()
    fused(bank, requests)
    first, second, _ = fused.jobs
    bank = fused.swap(bank, first, cases.job(case, 7).params)  # compiles the write
    with count_compiles() as compiled:
        fused(bank, requests)
        bank = fused.swap(bank, second, cases.job(case, 8).params)
        fused(bank, requests)
    assert compiled == []


def test_a_lone_job_swaps_without_compiling():
    case, fused, bank, requests = fresh(num_jobs=1)
    fused(bank, requests)
    with count_compiles() as compiled:
        bank = fused.swap(bank, "mlp.0", cases.job(case, 7).params)
        fused(bank, requests)
    assert compiled == []


def test_a_gradient_of_the_same_shapes_compiles_nothing():
    _, fused, bank, requests = fresh(name="embedding")
    grad_fn = jax.jit(jax.grad(lambda b, x: sum(y.sum() for y in fused(b, x).values())))
    grad_fn(bank, requests)
    bank = fused.swap(bank, "embedding.0", fused.jobs["embedding.1"].params)
    with count_compiles() as compiled:
        grad_fn(bank, requests)
    assert compiled == []


def counted():
    """Return a function and the list of the shapes that it was traced with."""
    calls = []

    def apply_fn(p, x):
        calls.append(x.shape)
        return x * p

    return apply_fn, calls


def test_jobs_that_share_a_function_are_traced_once():
    apply_fn, calls = counted()
    x = np.ones((2, 3), "f")
    jobs = [stfuse.Job(f"j{i}", apply_fn, np.full(3, i, "f"), x) for i in range(8)]
    fused = stfuse.fuse(jobs, cost="cpu")
    fused(fused.pack(), {"j3": x, "j5": x})
    assert calls == [(1, 3)]
    assert len({id(job.jaxpr) for job in jobs}) == 1
    assert len({id(_trace.trace(job)) for job in jobs}) == 1


def test_a_shared_function_is_traced_again_for_what_changes_its_program():
    apply_fn, calls = counted()
    x, p = np.ones((2, 3), "f"), np.ones(3, "f")
    stfuse.Job("a", apply_fn, p, x)
    stfuse.Job("shape", apply_fn, p, np.ones((2, 3, 3), "f"))
    stfuse.Job("dtype", apply_fn, p, np.ones((2, 3), "i4"))
    stfuse.Job("weak", apply_fn, 1.0, x)
    stfuse.Job("weaker", apply_fn, 1, x)
    stfuse.Job("weak_array", apply_fn, jnp.full((3,), 1.0), x)
    stfuse.Job("unbatched", apply_fn, p, x, batched=False)
    with jax.default_matmul_precision("bfloat16"):
        stfuse.Job("precision", apply_fn, p, x)
    with jax.numpy_dtype_promotion("strict"):
        stfuse.Job("promotion", apply_fn, p, x)
    with jax.default_prng_impl("rbg"):
        stfuse.Job("randomness", apply_fn, p, x)
    assert len(calls) == 10


@dataclasses.dataclass(frozen=True)
class Scale:
    by: float
    plus: int = dataclasses.field(default=0, compare=False)

    def __call__(self, params, x):
        return x * self.by + self.plus + params


def test_callables_that_are_equal_are_traced_apart():
    x, p = np.ones((1, 2), np.int32), np.int32(0)
    found = []
    for scale in (Scale(2), Scale(2.0), Scale(2, plus=3)):
        fused = stfuse.fuse([stfuse.Job("a", scale, p, x)], cost="cpu")
        found.append(fused(fused.pack(), {"a": x})["a"])
    assert [y.dtype for y in found] == [np.int32, np.float32, np.int32]
    assert [float(y[0, 0]) for y in found] == [2, 2, 5]


def test_a_callable_that_was_changed_is_traced_again():
    class Shift:
        by = 1

        def __call__(self, params, x):
            return x + self.by

    shift, x = Shift(), np.zeros((1, 2), np.float32)
    jobs = [stfuse.Job("one", shift, {}, x)]
    shift.by = 2
    jobs.append(stfuse.Job("two", shift, {}, x))
    fused = stfuse.fuse(jobs, cost="cpu")
    found = fused(fused.pack(), {"one": x, "two": x})
    assert [float(found[k][0, 0]) for k in ("one", "two")] == [1, 2]


class Scaled(nn.Module):
    by: float

    def __call__(self, x, plus):
        return x * self.by + plus


def test_equal_linen_modules_share_one_trace():
    x = np.ones((1, 2), np.int32)

    def job(by, plus):
        return stfuse.Job.from_linen("a", Scaled(by), {}, x, plus=plus)

    assert job(2, 1).jaxpr is job(2, 1).jaxpr
    # Equal as numbers, and as keys of a dict, but not as programs.
    assert job(2, 1).outputs.dtype == np.int32
    assert job(2.0, 1).outputs.dtype == np.float32
    assert job(2, True).outputs.dtype == np.int32
    assert job(2, 1.0).outputs.dtype == np.float32


def test_equal_nnx_models_share_one_trace():
    x = BY_NAME["nnx"].inputs(0, 1)
    one, other = (stfuse.Job.from_nnx("a", functions.Nnx(seed), x) for seed in (0, 1))
    assert one.jaxpr is other.jaxpr
    assert one.jaxpr is not cases.job(BY_NAME["nnx"], 0).jaxpr  # that one evaluates


def test_jobs_and_fused_free_their_arrays_when_forgotten():
    def make():
        held = jnp.ones((5, 5))
        params = [jnp.full((5,), float(i)) for i in range(3)]
        x = np.ones((2, 5), "f")
        jobs = [
            stfuse.Job(f"j{i}", lambda p, x: jnp.tanh(x @ held) * p, p, x)
            for i, p in enumerate(params)
        ]
        fused = stfuse.fuse(jobs, cost="cpu")
        bank = fused.pack()
        requests = dict.fromkeys(fused.jobs, x)
        fused(bank, requests)
        jax.grad(lambda b: fused(b, requests)["j0"].sum())(bank)
        bank = fused.swap(bank, "j1", jnp.zeros(5))
        leaves = [held, *params, *bank.stacks]
        return fused, bank, [weakref.ref(leaf) for leaf in leaves]

    gc.collect()
    before = len(jax.live_arrays())
    fused, bank, refs = make()
    gc.collect()
    assert all(ref() is not None for ref in refs)
    del fused, bank
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert len(jax.live_arrays()) <= before


def test_a_forgotten_function_takes_its_trace_with_it():
    apply_fn, _ = counted()
    job = stfuse.Job("a", apply_fn, np.ones(3, "f"), np.ones((1, 3), "f"))
    traced = weakref.ref(_trace.trace(job).ops[0].bind_fn)
    kept = weakref.ref(apply_fn)
    del job
    gc.collect()
    assert traced() is not None  # its function is still there
    del apply_fn
    gc.collect()
    assert kept() is None and traced() is None
