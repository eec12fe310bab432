"""One table of cases for the whole suite, and the one comparison.

A row says how to build a job, how to draw its inputs, and how closely an answer must
match. Tests cross the rows with group sizes, transforms and poison; none of them
branches on a row's name.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import stfuse
from stfuse import _bank
from tests import functions

Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of job.

    Attributes:
        name: what pytest prints.
        make: seed to the arguments of ``build`` between the name and the example.
        make_inputs: ``(rng, rows)`` to a request's inputs; rows are ignored by a job
            without a row axis.
        sum_length: number of terms of its longest chain of sums; 0 if the function
            only moves data, or works on integers.
        dtype: the coarsest dtype that its arithmetic passes through.
        batched: whether the job has a row axis.
        has_gradient: whether ``jax.grad`` of the function exists.
        build: the constructor.
    """

    name: str
    make: Callable[[int], tuple[Any, ...]]
    make_inputs: Callable[[Rng, int], Any]
    sum_length: int
    dtype: Any = np.float32
    batched: bool = True
    has_gradient: bool = True
    build: Callable[..., stfuse.Job] = stfuse.Job

    def __str__(self) -> str:
        return self.name

    def job(self, name: str, seed: int = 0) -> stfuse.Job:
        """Build the job that a seed stands for."""
        options = {} if self.batched else {"batched": False}
        return self.build(name, *self.make(seed), self.inputs(0, 1), **options)

    def inputs(self, seed: int, rows: int) -> Any:
        """Draw one request."""
        return self.make_inputs(np.random.default_rng(seed), rows)


def alone(job: stfuse.Job, inputs: Any, params: Any = None) -> Any:
    """Return the promise's right-hand side: the job's own answer, stfuse not involved.

    A batched job answers row by row, each as if it were alone; any other is called on
    its inputs as they are.
    """
    params = job.params if params is None else params
    apply_fn = jax.jit(job.apply_fn)
    if not job.batched:
        return jax.tree.map(np.asarray, apply_fn(params, inputs))
    num_rows = len(jax.tree.leaves(inputs)[0])
    rows = [
        apply_fn(params, jax.tree.map(lambda x, r=r: np.asarray(x)[r : r + 1], inputs))
        for r in range(num_rows)
    ]
    return jax.tree.map(lambda *xs: np.concatenate(list(map(np.asarray, xs))), *rows)


def assert_same(actual: Any, expected: Any, case: Case) -> None:
    """Check that two answers have one structure, shapes, dtypes, and values.

    Leaves of integers, and of cases that only move data (``sum_length`` 0), must be
    equal bit for bit. Else, with n = ``case.sum_length``, for every element

        |actual - expected| <= 8 eps(case.dtype) sqrt(n) max(1, max |expected|)

    since n roundings of relative size eps/2 in another order differ by about
    eps sqrt(n) of the largest partial sum. NaN must face NaN, and an infinity its like.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if case.sum_length == 0 or not jnp.issubdtype(e.dtype, jnp.inexact):
            assert_bitwise(a, e)
            continue
        wide = np.complex128 if np.iscomplexobj(e) else np.float64
        a, e = a.astype(wide), e.astype(wide)
        largest = np.max(np.abs(e), where=np.isfinite(e), initial=1.0)
        eps = float(ml_dtypes.finfo(case.dtype).eps)
        limit = 8 * eps * math.sqrt(case.sum_length) * largest
        np.testing.assert_allclose(a, e, rtol=0, atol=limit, err_msg=case.name)


def assert_bitwise(actual: Any, expected: Any) -> None:
    """Check that two pytrees hold the same bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if a.tobytes() != e.tobytes():
            np.testing.assert_array_equal(a, e)
            raise AssertionError(f"equal values of unequal bytes: {a} and {e}")


@functools.cache
def job(case: Case, seed: int) -> stfuse.Job:
    """Return the job ``<case>.<seed>``, built once for the whole suite."""
    return case.job(f"{case.name}.{seed}", seed)


@functools.cache
def group(case: Case, num_jobs: int) -> stfuse.Fused:
    """Return ``num_jobs`` jobs of a case, fused once for the whole suite."""
    return stfuse.fuse([job(case, seed) for seed in range(num_jobs)], cost="cpu")


def requests(case: Case, fused: stfuse.Fused, rows: Sequence[int]) -> dict[str, Any]:
    """Return a request for each of some first jobs, with so many rows."""
    names = list(fused.jobs)[: len(rows)]
    return {
        name: case.inputs(i, n)
        for i, (name, n) in enumerate(zip(names, rows, strict=True))
    }


def slot_of(fused: stfuse.Fused, bank: stfuse.Bank, name: str) -> list[Any]:
    """Return one job's leaves of a bank, or of its gradient, closed-over ones last."""
    ((species, slot),) = fused._where[name]
    bank_number = fused._layout.bank_of[species]
    return list(_bank.read(fused._layout, bank, bank_number, slot))


def _floats(*shape: int, dtype: Any = np.float32) -> Callable[[Rng, int], Any]:
    return lambda rng, rows: functions.normal(rng, rows, *shape, dtype=dtype)


def _with(apply_fn: Any, *shapes: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """Return ``make`` of a function whose params are arrays of these shapes."""

    def make(seed: int) -> tuple[Any, Any]:
        leaves = functions.weights(seed, *shapes, dtype=dtype)
        return apply_fn, leaves if len(leaves) > 1 else leaves[0]

    return make


CASES = (
    Case("mlp", functions.digits_mlp, _floats(8, 8), sum_length=80),
    Case("cnn", functions.digits_cnn, _floats(8, 8), sum_length=80),
    Case("closed_over", functions.closed_over, _floats(4), sum_length=5),
    Case("closed_in_jit", functions.closed_in_jit, _floats(4), sum_length=5),
    Case("closed_in_scan", functions.closed_in_scan, _floats(4), sum_length=15),
    Case(
        "embedding",
        functions.embedding_params,
        lambda rng, rows: rng.integers(0, 7, (rows, 5), np.int32),
        sum_length=9,
    ),
    Case(
        "bool_input",
        _with(functions.bool_input, (4,)),
        lambda rng, rows: rng.integers(0, 2, (rows, 4)).astype(bool),
        sum_length=0,
    ),
    Case(
        "nested_trees",
        lambda seed: (
            functions.nested_trees,
            {"deep": [{"w": functions.weights(seed, (3, 3))[0]}]},
        ),
        lambda rng, rows: {
            "a": functions.normal(rng, rows, 3),
            "pair": (
                functions.normal(rng, rows, 3),
                rng.integers(0, 9, rows, np.int32),
            ),
        },
        sum_length=4,
    ),
    Case(
        "scalar_outputs",
        _with(functions.scalar_outputs, (3, 4)),
        _floats(3, 4),
        sum_length=12,
    ),
    Case(
        "zero_size",
        lambda seed: (
            functions.zero_size,
            {
                "w": functions.weights(seed, (3, 2))[0],
                "none": np.zeros((0, 2), np.float32),
            },
        ),
        lambda rng, rows: {
            "x": functions.normal(rng, rows, 3),
            "none": functions.normal(rng, rows, 0),
        },
        sum_length=3,
    ),
    Case(
        "bf16",
        _with(functions.bf16, (4, 6), (6, 2), dtype=ml_dtypes.bfloat16),
        _floats(4, dtype=ml_dtypes.bfloat16),
        sum_length=10,
        dtype=ml_dtypes.bfloat16,
    ),
    Case(
        "mixed_dtypes",
        functions.mixed_params,
        functions.mixed_inputs,
        sum_length=3,
        dtype=np.float16,
    ),
    Case("conv", _with(functions.CONV, (4, 3, 3, 2)), _floats(3, 7, 6), sum_length=18),
    Case(
        "depthwise_conv", _with(functions.DEPTHWISE, (3, 3, 1, 4)), _floats(5, 5, 4), 9
    ),
    Case("grouped_conv", _with(functions.GROUPED, (2, 2, 2, 6)), _floats(4, 5, 4), 8),
    Case(
        "transposed_conv",
        _with(functions.transposed, (3, 3, 2, 3)),
        _floats(3, 4, 2),
        18,
    ),
    Case("lstm", functions.lstm_params, _floats(4, 2), sum_length=24),
    Case(
        "while_loop",
        _with(functions.while_loop, (4,)),
        _floats(4),
        sum_length=40,
        has_gradient=False,
    ),
    Case("cond", _with(functions.cond, (4,)), _floats(4), sum_length=1),
    Case("sort_top_k", _with(functions.sort_top_k, (5,)), _floats(5), sum_length=0),
    Case("move_data", _with(functions.move_data, (4,)), _floats(4), sum_length=0),
    Case(
        "random",
        _with(functions.random, (3,)),
        lambda rng, rows: rng.integers(0, 2**32, (rows, 2), np.uint32),
        sum_length=1,
    ),
    Case(
        "straight_through", _with(functions.quantized, (4,)), _floats(4), sum_length=1
    ),
    Case("remat", _with(functions.remat, (4, 4), (4, 4)), _floats(4), sum_length=8),
    Case("attention", functions.attention_params, _floats(5, 4), sum_length=16),
    Case(
        "training_batch_norm", functions.batch_norm_params, _floats(5, 4), sum_length=16
    ),
    Case(
        "row_coupled",
        _with(functions.row_coupled, (3,)),
        lambda rng, rows: functions.normal(rng, 6, 3),
        sum_length=12,
        batched=False,
    ),
    Case(
        "training_step",
        functions.training_params,
        lambda rng, rows: {
            "x": functions.normal(rng, 6, 3),
            "y": functions.normal(rng, 6, 1),
        },
        sum_length=32,
        batched=False,
    ),
    Case(
        "no_inputs",
        _with(functions.no_inputs, (4,)),
        lambda rng, rows: None,
        sum_length=8,
        batched=False,
    ),
    Case(
        "python_scalars",
        lambda seed: (functions.python_scalars, {"scale": 0.5 + seed, "shift": seed}),
        _floats(3, dtype=ml_dtypes.bfloat16),
        sum_length=2,
        dtype=ml_dtypes.bfloat16,
    ),
    Case(
        "weak_arrays",
        lambda seed: (functions.weak_arrays, jnp.full((3,), 0.5 + seed)),
        _floats(3, dtype=ml_dtypes.bfloat16),
        sum_length=1,
        dtype=ml_dtypes.bfloat16,
    ),
    Case("linalg", _with(functions.linalg, (3, 3)), _floats(3, 3), sum_length=64),
    Case(
        "linen",
        functions.linen,
        _floats(4),
        sum_length=9,
        build=functools.partial(stfuse.Job.from_linen, train=False),
    ),
    Case(
        "nnx",
        lambda seed: (functions.nnx_model(seed),),
        _floats(4),
        sum_length=5,
        build=stfuse.Job.from_nnx,
    ),
)
BY_NAME = {case.name: case for case in CASES}
