"""Plan to step: one pure function over the stacked state.

Rules:
    Species that share launches form a component, which is evaluated over all its rows;
    the rows of a slot are an outer map over its whole program, so weights are not
    copied and rows become the M axis of the GEMMs.
    Differentiate first, fuse second: the derivative of a job is a program of its own,
    traced where JAX applies every custom rule, then aligned and evaluated like any
    other. Padding gets the gradient zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _align, _rules
from stfuse._bank import is_stacked, open_shelves
from stfuse._errors import StfuseError
from stfuse._evaluate import evaluate
from stfuse._layout import Layout
from stfuse._part import Part
from stfuse._plan import Plan
from stfuse._program import Literal, Trace, is_inexact
from stfuse._together import How
from stfuse._types import Cost
from stfuse._values import Env, Held, read

# On a GPU a step is a CUDA graph, in which launches that wait for nothing of one
# another need not be in a sequence.
OVERLAPPING = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}

# Rows to the derivative's programs, one per variant among the species' jobs.
VjpFn = Callable[[int], Sequence[Trace]]
Vjps = Sequence[tuple[VjpFn, tuple[int, ...]]]


def make_step(
    plan: Plan,
    layout: Layout,
    *,
    cost: Cost,
    lowering: str,
    vjps: Vjps | None = None,
) -> Callable[..., Any]:
    """Return the fused step of a plan.

    Args:
        plan: who shares which launch.
        layout: where leaves stand.
        cost: the device that lowerings are chosen for.
        lowering: one of `_lower.LOWERINGS`, or ``"apart"``: nothing is shared, each
            slot's program is computed by itself.
        vjps: per species, its derivative programs by rows, and the index of the one
            that each slot uses; None for a step that is never differentiated.

    Returns:
        ``step(stacks, slots, inputs) -> outputs``: ``stacks`` are the bank's arrays;
        ``slots`` per species int32 ``[K]``, None for all of them in order, or ``()``
        if it takes no part; ``inputs`` per buffer of the layout ``[rows, B, *padded]``
        or None; ``outputs`` likewise.
    """

    def step(stacks: Any, slots: Any, inputs: Any) -> tuple[Any, ...]:
        counts = slot_counts(layout, slots)
        arrays, stacks = stacks, open_shelves(layout, stacks)
        outputs: list[Any] = [None] * len(layout.outputs)
        for component in layout.components:
            present = [s for s in component if s in counts]
            if present:
                part = Part(plan, layout, {s: counts[s] for s in present})
                run = _differentiable(part, cost, lowering, vjps)
                used = {view.array: stacks[view.array] for view in part.params}
                shelves = {i: arrays[a] for i, a in _shelves(layout, used).items()}
                index = {s: slots[s] for s in present}
                own = run(used, shelves, [inputs[i] for i in part.inputs], index)
                for i, x in zip(part.outputs, own, strict=True):
                    outputs[i] = x
        return tuple(outputs)

    return step


def compiler_options(plan: Plan) -> dict[str, str]:
    """Return what XLA is told of a step: where jobs differ, much may overlap."""
    is_mixed = len(plan.species) > 1 and plan.cost.source != "cpu"
    return OVERLAPPING if is_mixed else {}


def _shelves(layout: Layout, stacks: Iterable[int]) -> dict[int, int]:
    """Return which arrays of a bank the stacks that stand on shelves are in."""
    places = {i: layout.array_of(i) for i in stacks}
    return {i: a for i, (a, k) in places.items() if k is not None}


def slot_counts(layout: Layout, slots: Sequence[Any]) -> dict[int, int]:
    """Return how many slots of each species a step computes."""
    return {
        s: layout.capacities[layout.bank_of[s]] if index is None else len(index)
        for s, index in enumerate(slots)
        if not isinstance(index, tuple)
    }


def _differentiable(
    part: Part, cost: Cost, lowering: str, vjps: Vjps | None
) -> Callable[..., list[Any]]:
    """Return ``run(stacks, shelves, inputs, slots)`` of a component, differentiable."""
    if lowering == "apart":
        run_rows = functools.partial(part.run_apart, cost)
        lowering = "heuristic"  # of the derivative
    else:
        run_rows = functools.partial(part.run_rows, cost, lowering)

    def run_named(stacks: Any, shelves: Any, inputs: Any, slots: Any) -> list[Any]:
        return run_rows(part.named(stacks, slots, shelves), inputs)

    if vjps is None:
        return run_named
    run = jax.custom_vjp(run_named)

    def forward(stacks: Any, shelves: Any, inputs: Any, slots: Any) -> Any:
        return run_named(stacks, shelves, inputs, slots), (stacks, inputs, slots)

    def backward(residuals: Any, cotangents: Any) -> Any:
        stacks, inputs, slots = residuals
        moving = [c if is_inexact(c) else None for c in cotangents]
        stacks, inputs, moving = _differentiate_once((stacks, inputs, moving))
        views, unview = jax.vjp(lambda stacks: part.views(stacks, slots), stacks)
        rows = inputs[0].shape[1]
        traces = {s: list(vjps[s][0](rows)) for s in part.counts}
        results = [
            _pull_back(
                part,
                {s: each[min(v, len(each) - 1)] for s, each in traces.items()},
                How(1, cost, lowering, has_regions=False),  # its rows are inside
                (views, inputs, moving),
            )
            for v in range(max(map(len, traces.values())))
        ]
        picked = _picked(part, results, vjps, slots)
        of_views, of_inputs = _summed(part, picked, views)
        (of_stacks,) = unview(list(map(_like, of_views, views)))
        return of_stacks, None, of_inputs, None  # a shelf is the same as its stacks

    run.defvjp(forward, backward)
    return run


def _like(cotangent: Any, x: Any) -> Any:
    """Return a cotangent of an array: zeros if there is none."""
    if cotangent is not None:
        return cotangent
    if is_inexact(x):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _pull_back(
    part: Part, programs: Mapping[int, Trace], how: How, given: Any
) -> list[Any]:
    """Return the cotangents of views, then inputs, a row per slot; None is zero."""
    views, inputs, cotangents = given
    env = part.env(programs, [(x, None, None) for x in views])
    part.enter(env, inputs)
    for i, array in zip(part.outputs, cotangents, strict=True):
        if array is not None:
            taking = part.taking(part.layout.outputs[i])
            starts = env.starts([s for s, _ in taking])
            held = Held(array, True, (False,) * (array.ndim - 1), starts)
            for s, leaf in taking:
                trace = part.traces[s]
                before = sum(map(is_inexact, trace.out_specs[:leaf]))
                env.values[s, len(trace.specs) + before] = held
    counts = [part.counts.get(s, 1) for s in range(len(part.plan.species))]
    evaluate(env, _align.schedule(programs, how.cost, counts), how)
    params = [view.members for view in part.params]
    staged = [
        [(s, part.traces[s].num_params + leaf) for s, leaf in taking if leaf >= 0]
        for taking in map(part.taking, map(part.layout.inputs.__getitem__, part.inputs))
    ]
    shapes = [
        x.shape[is_stacked(x, part.layout.params[view.array]) :]
        for view, x in zip(part.params, views, strict=True)
    ] + [x.shape[1:] for x in inputs]
    return [
        _gradient(part, env, values, shape)
        for values, shape in zip([*params, *staged], shapes, strict=True)
    ]


def _gradient(
    part: Part, env: Env, values: Sequence[tuple[int, int]], shape: tuple[int, ...]
) -> Any:
    """Return the cotangent of some values as one array: zero wherever it is padding.

    Closed-over arrays are constants: their rows get zeros.
    """
    places = [_places(part.traces[s]).get(value) for s, value in values]
    if all(place is None for place in places):
        return None
    found, specs = [], []
    for (s, value), place in zip(values, places, strict=True):
        if place is None:
            spec = part.traces[s].specs[value]
            zeros: Any = Literal(np.zeros(spec.shape, spec.dtype), spec)
            found.append((s, zeros))
            specs.append(spec)
        else:
            found.append((s, env.programs[s].outputs[place]))
            specs.append(env.programs[s].out_specs[place])
    if not any(isinstance(atom, int) for _, atom in found):
        return None
    x = _rules.to_stacked(read(env, found, specs, tuple(shape)))
    return _rules.mask(x, range(len(shape))).array


def _places(trace: Trace) -> dict[int, int]:
    """Return which output of the derivative belongs to which value of a program."""
    num_own = trace.num_params - len(trace.consts)
    moving = [
        v
        for v, spec in enumerate(trace.specs)
        if is_inexact(spec) and not num_own <= v < trace.num_params
    ]
    return {v: k for k, v in enumerate(moving)}


def _picked(
    part: Part, results: Sequence[list[Any]], vjps: Vjps, slots: Mapping[int, Any]
) -> list[Any]:
    """Return each slot's gradients from the variant of the derivative that it has."""
    if len(results) == 1:
        return results[0]
    buffers = [part.layout.inputs[i] for i in part.inputs]
    species = [[s for s, _ in view.members] for view in part.params]
    species += [[s for s, _ in part.taking(buffer)] for buffer in buffers]
    chosen = {}
    for s in part.counts:
        table = np.asarray(vjps[s][1], np.int32)
        chosen[s] = table if slots[s] is None else jnp.asarray(table)[slots[s]]

    def pick(own: Sequence[int], columns: Sequence[Any]) -> Any:
        picked = columns[0]
        if picked is None:
            return None
        variant = jnp.concatenate([jnp.asarray(chosen[s]) for s in own])
        for v, x in enumerate(columns[1:], 1):
            here = jnp.reshape(variant == v, (-1,) + (1,) * (x.ndim - 1))
            picked = jnp.where(here, x, picked)
        return picked

    return list(map(pick, species, zip(*results, strict=True)))


def _summed(part: Part, grads: list[Any], views: Sequence[Any]) -> tuple[Any, Any]:
    """Return cotangents like views and inputs; shared leaves get the sum over slots."""
    of_views = []
    for view, array, grad in zip(part.params, views, grads, strict=False):
        shared = not is_stacked(array, part.layout.params[view.array])
        of_views.append(grad.sum(0) if shared and grad is not None else grad)
    return of_views, grads[len(of_views) :]


@jax.custom_jvp
def _differentiate_once(values: Any) -> Any:
    return values


@_differentiate_once.defjvp
def _refuse_second_order(primals: Any, tangents: Any) -> Any:
    raise StfuseError(
        "`stfuse.Fused`: found a second derivative; only first order, reverse mode "
        "(`jax.grad`, `jax.vjp`) is fused. Differentiate `job.apply_fn` itself twice."
    )
