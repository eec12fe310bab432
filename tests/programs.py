"""Random small programs: a spec to paste, a strategy that draws it, its jobs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import stfuse
from tests.cases import Case
from tests.program_moves import MOVES
from tests.program_ops import STEPS, Body

ALL = {**STEPS, **MOVES}
DTYPES = ("float32", "float32", "float32", "bfloat16", "int32")
SIZES = (1, 2, 3, 5, 7)
# A step: its name, two numbers that choose its form, two sizes.
Move = tuple[str, int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Program:
    """One model.

    Attributes:
        shape: of its input.
        dtype: of its input.
        steps: what it does.
        is_mapped: whether rows go through ``jax.vmap``, or one row is taken as it is.
    """

    shape: tuple[int, ...]
    dtype: str
    steps: tuple[Move, ...]
    is_mapped: bool = False


@dataclasses.dataclass(frozen=True)
class Batch:
    """Jobs to fuse.

    Attributes:
        programs: the models.
        members: per job its model; jobs of one model have other weights.
        cost: the device to plan for.
        max_waste: as `stfuse.fuse` takes it.
        rows: per job the rows that it sends; 0 if the call does not name it.
    """

    programs: tuple[Program, ...]
    members: tuple[int, ...]
    cost: str = "h200"
    max_waste: float | None = None
    rows: tuple[int, ...] = (1, 1, 1, 1, 1, 1)


def evaluate(
    program: Program, weights: list[Any] | None, inputs: Any
) -> tuple[Body, Any]:
    """Run a program on one row."""
    x = inputs["x"]
    body = Body(weights, x, inputs.get("key"))
    for name, a, b, m, n in program.steps:
        x = body.after(ALL[name](body, x, a, b, m, n))
    return body, x


def example(program: Program, rows: int = 1) -> Any:
    """Return the specs of a request."""
    specs = {"x": jax.ShapeDtypeStruct((rows, *program.shape), program.dtype)}
    if any(name == "random" for name, *_ in program.steps):
        specs["key"] = jax.ShapeDtypeStruct((rows, 2), np.uint32)
    return specs


@functools.cache
def outline(program: Program) -> Body:
    """Return what is known of a program without running it."""
    found = []

    def run(inputs: Any) -> Any:
        body, y = evaluate(program, None, inputs)
        found.append(body)
        return y

    row = {k: jax.ShapeDtypeStruct(s.shape[1:], s.dtype) for k, s in _items(program)}
    jax.eval_shape(run, row)
    return found[0]


def _items(program: Program) -> Any:
    return example(program).items()


def _run(program: Program, weights: list[Any], inputs: Any) -> Any:
    one = functools.partial(_answer, program, weights)
    if program.is_mapped:
        return jax.vmap(one)(inputs)
    row = {k: jnp.squeeze(x, 0) for k, x in inputs.items()}
    return jax.tree.map(lambda y: y[None], one(row))


def _answer(program: Program, weights: list[Any], row: Any) -> Any:
    """Return the last value, and the first that a step made, if there are more."""
    body, y = evaluate(program, weights, row)
    return [y, body.kept[1][0]] if len(body.kept) > 2 else [y]


@functools.cache
def apply_fn(program: Program) -> Any:
    return functools.partial(_run, program)


def draw(rng: np.random.Generator, spec: Any) -> Any:
    """Return small whole numbers."""
    if spec.dtype == np.uint32:
        return rng.integers(0, 2**32, spec.shape, np.uint32)
    low, high = (-5, 9) if spec.dtype == np.int32 else (-3, 4)
    return rng.integers(low, high, spec.shape).astype(spec.dtype)


def weights_of(program: Program, seed: int) -> list[Any]:
    rng = np.random.default_rng([seed, 1])
    return [draw(rng, spec) for spec in outline(program).specs]


def inputs_of(program: Program, seed: int, rows: int) -> Any:
    rng = np.random.default_rng([seed, 2])
    return {k: draw(rng, spec) for k, spec in example(program, rows).items()}


def jobs_of(batch: Batch) -> list[stfuse.Job]:
    """Return the jobs ``0``, ``1``, ... of a batch."""
    return [
        stfuse.Job(
            str(i),
            apply_fn(batch.programs[p]),
            weights_of(batch.programs[p], i),
            example(batch.programs[p]),
        )
        for i, p in enumerate(batch.members)
    ]


def fused_of(batch: Batch) -> stfuse.Fused:
    return stfuse.fuse(jobs_of(batch), cost=batch.cost, max_waste=batch.max_waste)


def requests_of(batch: Batch, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """Return what the jobs that a call names send."""
    return {
        str(i): inputs_of(batch.programs[p], i, n)
        for i, (p, n) in enumerate(zip(batch.members, rows or batch.rows, strict=False))
        if n
    }


def program_of(batch: Batch, name: str) -> Program:
    return batch.programs[batch.members[int(name)]]


def case_of(program: Program, longer: int = 0) -> Case:
    """Return how closely a program's answers must match; see `cases.assert_same`.

    A derivative's sums are longer.
    """
    body = outline(program)
    dtype = ml_dtypes.bfloat16 if body.coarse else np.float32
    length = 16 * body.terms + longer
    return Case(repr(program), lambda seed: (), lambda rng, rows: None, length, dtype)


_forms = st.integers(0, 31)
_sizes = st.sampled_from(SIZES)


@st.composite
def programs(draw: Any, names: tuple[str, ...], max_steps: int) -> tuple[Program, ...]:
    """Draw a few programs: one skeleton at several sizes, or several skeletons."""
    num_programs = draw(st.sampled_from((2, 3, 2, 3, 4, 1)))
    skeletons: list[list[tuple[str, int, int]]] = []
    step = st.tuples(st.sampled_from(names), _forms, _forms)
    skeleton = st.lists(step, min_size=1, max_size=max_steps)
    first = draw(skeleton)
    rank, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(DTYPES))
    is_mapped = draw(st.booleans())
    found = []
    for _ in range(num_programs):
        own = first
        if draw(st.integers(0, 3)) == 3:
            own = draw(skeleton)
        elif len(first) > 1 and draw(st.integers(0, 4)) == 4:
            cut = draw(st.integers(0, len(first) - 1))
            own = first[:cut] + first[cut + 1 :]
        skeletons.append(own)
        found.append(
            Program(
                tuple(draw(_sizes) for _ in range(rank)),
                dtype,
                tuple((*step, draw(_sizes), draw(_sizes)) for step in own),
                is_mapped,
            )
        )
    return tuple(found)


@st.composite
def batches(
    draw: Any, names: tuple[str, ...] = tuple(ALL), max_steps: int = 5
) -> Batch:
    """Draw jobs to fuse; half of the calls may leave some out."""
    models = draw(programs(names, max_steps))
    again = draw(st.lists(st.integers(0, len(models) - 1), max_size=2))
    members = (*range(len(models)), *again)
    members = members if len(members) > 1 else (0, 0)
    least = draw(st.integers(0, 1))
    rows = [draw(st.integers(least, 3)) for _ in members]
    return Batch(
        models,
        members,
        draw(st.sampled_from(("h200", "h200", "h200", "cpu"))),
        draw(st.sampled_from((None, None, None, 0.0, 0.5))),
        tuple(rows) if any(rows) else (1, *rows[1:]),
    )
