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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _align, _rules
from stfuse._bank import is_stacked, open_shelves
from stfuse._errors import StfuseError
from stfuse._evaluate import How, evaluate
from stfuse._layout import Buffer, Layout
from stfuse._plan import Plan
from stfuse._program import Literal, Trace, is_inexact
from stfuse._types import Cost
from stfuse._values import Env, Held, assemble, read

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
        lowering: ``"auto"`` or ``"native"``.
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
        stacks = open_shelves(layout, stacks)
        outputs: list[Any] = [None] * len(layout.outputs)
        for component in layout.components:
            present = [s for s in component if s in counts]
            if present:
                part = _Part(plan, layout, {s: counts[s] for s in present})
                run = _differentiable(part, cost, lowering, vjps)
                views = part.views(stacks, slots)
                index = {s: slots[s] for s in present}
                own = run(views, [inputs[i] for i in part.inputs], index)
                for i, x in zip(part.outputs, own, strict=True):
                    outputs[i] = x
        return tuple(outputs)

    return step


def slot_counts(layout: Layout, slots: Sequence[Any]) -> dict[int, int]:
    """Return how many slots of each species a step computes."""
    return {
        s: layout.capacities[layout.bank_of[s]] if index is None else len(index)
        for s, index in enumerate(slots)
        if not isinstance(index, tuple)
    }


@dataclass(frozen=True, slots=True)
class _View:
    """Parameters as a step uses them: one array.

    Attributes:
        array: which array of the bank it comes from.
        members: ``(species, leaf)`` in the order of its rows.
    """

    array: int
    members: tuple[tuple[int, int], ...]


class _Part:
    """A component's species that take part in a step."""

    def __init__(self, plan: Plan, layout: Layout, counts: Mapping[int, int]) -> None:
        self.plan, self.layout, self.counts = plan, layout, counts
        self.traces = {s: plan.species[s].trace for s in counts}
        self.inputs = self._taking_part(layout.inputs)
        self.outputs = self._taking_part(layout.outputs)
        self.params = self._params()

    def taking(self, buffer: Buffer) -> list[tuple[int, int]]:
        """Return the members of a buffer that take part."""
        return [member for member in buffer.members if member[0] in self.counts]

    def _taking_part(self, buffers: Sequence[Buffer]) -> list[int]:
        return [i for i, buffer in enumerate(buffers) if self.taking(buffer)]

    def _params(self) -> list[_View]:
        """Return the views of the bank that the species need.

        Programs of one job at several lengths read the same rows: each has a view.
        """
        rounds: list[dict[int, int]] = []  # bank to species
        for s in self.counts:
            bank = self.layout.bank_of[s]
            free = [taken for taken in rounds if bank not in taken]
            if not free:
                free = [{}]
                rounds += free
            free[0][bank] = s
        return [
            _View(i, tuple(sorted((taken[b], leaf) for b, leaf in own)))
            for taken in rounds
            for i, buffer in enumerate(self.layout.params)
            if (own := [(b, leaf) for b, leaf in buffer.members if b in taken])
        ]

    def views(self, stacks: Sequence[Any], slots: Sequence[Any]) -> list[Any]:
        """Return the parameters of the named slots, one array per view."""
        return [self._view(view, stacks[view.array], slots) for view in self.params]

    def _view(self, view: _View, stack: Any, slots: Sequence[Any]) -> Any:
        buffer = self.layout.params[view.array]
        if not is_stacked(stack, buffer):
            return stack
        starts = buffer.starts(dict(enumerate(self.layout.capacities)))
        index, is_whole, at = [], True, 0
        for s, _ in view.members:
            bank = self.layout.bank_of[s]
            is_whole = is_whole and slots[s] is None and starts[bank] == at
            own = np.arange(self.counts[s]) if slots[s] is None else slots[s]
            index.append(own + np.int32(starts[bank]))
            at += self.counts[s]
        if is_whole and at == stack.shape[0]:
            return stack
        return jnp.take(stack, jnp.concatenate(index), axis=0, mode="clip")

    def env(self, programs: Mapping[int, Trace], views: Sequence[Any]) -> Env:
        """Return an evaluation's values: parameters only."""
        env = Env(programs, self.counts)
        for view, array in zip(self.params, views, strict=True):
            stacked = is_stacked(array, self.layout.params[view.array])
            ndim = array.ndim - stacked
            starts = env.starts([s for s, _ in view.members])
            held = Held(array, stacked, (True,) * ndim, starts)
            for s, leaf in view.members:
                env.values[s, leaf] = held
        return env

    def enter(self, env: Env, inputs: Sequence[Any]) -> None:
        """Add the inputs."""
        for i, array in zip(self.inputs, inputs, strict=True):
            taking = self.taking(self.layout.inputs[i])
            starts = env.starts([s for s, _ in taking])
            held = Held(array, True, (True,) * (array.ndim - 1), starts)
            for s, leaf in taking:
                if leaf >= 0:
                    env.values[s, self.traces[s].num_params + leaf] = held

    def leave(self, env: Env) -> list[Any]:
        """Return the outputs, one array per buffer."""
        found = []
        for i in self.outputs:
            taking = self.taking(self.layout.outputs[i])
            values = [(s, self.traces[s].outputs[leaf]) for s, leaf in taking]
            specs = [self.traces[s].out_specs[leaf] for s, leaf in taking]
            found.append(assemble(env, values, specs).array)
        return found

    def run_rows(
        self, cost: Cost, lowering: str, views: Sequence[Any], inputs: Sequence[Any]
    ) -> list[Any]:
        """Run the programs over all rows of all slots."""
        how = How(inputs[0].shape[1], cost, lowering)

        def one_row(views: Any, row: Any) -> list[Any]:
            env = self.env(self.traces, views)
            self.enter(env, row)
            evaluate(env, self.plan.nodes, how)
            return self.leave(env)

        return jax.vmap(one_row, in_axes=(None, 1), out_axes=1)(views, list(inputs))


def _differentiable(
    part: _Part, cost: Cost, lowering: str, vjps: Vjps | None
) -> Callable[..., list[Any]]:
    """Return ``run(views, inputs, slots)`` of a component, with its derivative."""
    run_rows = functools.partial(part.run_rows, cost, lowering)
    if vjps is None:
        return lambda views, inputs, slots: run_rows(views, inputs)

    @jax.custom_vjp
    def run(views: Any, inputs: Any, slots: Any) -> list[Any]:
        return run_rows(views, inputs)

    def forward(views: Any, inputs: Any, slots: Any) -> Any:
        return run_rows(views, inputs), (views, inputs, slots)

    def backward(residuals: Any, cotangents: Any) -> Any:
        views, inputs, slots = residuals
        moving = [c if is_inexact(c) else None for c in cotangents]
        views, inputs, moving = _differentiate_once((views, inputs, moving))
        rows = inputs[0].shape[1]
        traces = {s: list(vjps[s][0](rows)) for s in part.counts}
        results = [
            _pull_back(
                part,
                {s: each[min(v, len(each) - 1)] for s, each in traces.items()},
                How(1, cost, lowering),  # its rows are inside
                (views, inputs, moving),
            )
            for v in range(max(map(len, traces.values())))
        ]
        return (*_summed(part, _picked(part, results, vjps, slots), views), None)

    run.defvjp(forward, backward)
    return run


def _pull_back(
    part: _Part, programs: Mapping[int, Trace], how: How, given: Any
) -> list[Any]:
    """Return the cotangents of views, then inputs, a row per slot; None is zero."""
    views, inputs, cotangents = given
    env = part.env(programs, views)
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
    part: _Part, env: Env, values: Sequence[tuple[int, int]], shape: tuple[int, ...]
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
    part: _Part, results: Sequence[list[Any]], vjps: Vjps, slots: Mapping[int, Any]
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


def _summed(part: _Part, grads: list[Any], views: Sequence[Any]) -> tuple[Any, Any]:
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
