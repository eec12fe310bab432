"""Plan to step: one pure function over the stacked state.

Rules:
    A value is a stack ``[K, ...]`` or, while only shared things went into it, one
    array for all slots. An op over shared values runs once; any other op is mapped
    over the slots. Rows are an outer map over the whole program, so weights are not
    copied and rows become the M axis of the GEMMs.
    Differentiate first, fuse second: the derivative is a program of its own, traced
    where JAX applies every custom rule, and evaluated the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _lower
from stfuse._errors import StfuseError
from stfuse._program import Literal, Trace, is_inexact
from stfuse._types import Cost

# Rows to the derivative's programs, one per variant among the species' jobs.
VjpFn = Callable[[int], Sequence[Trace]]


def make_step(
    traces: Sequence[Trace],
    *,
    cost: Cost,
    lowering: str,
    vjps: Sequence[tuple[VjpFn, tuple[int, ...]]] | None = None,
) -> Callable[..., Any]:
    """Return the fused step of some species.

    Args:
        traces: one program per species.
        cost: the device that lowerings are chosen for.
        lowering: ``"auto"`` or ``"native"``.
        vjps: per species, its derivative programs by rows, and the index of the one
            that each slot uses; None for a step that is never differentiated.

    Returns:
        ``step(bank, slots, inputs) -> outputs``, each a tuple with an entry per
        species: ``bank`` leaves ``[capacity, ...]`` or shared ``[...]``; ``slots``
        int32 ``[K]``, or None for all of them in order; ``inputs`` leaves
        ``[K, B, ...]``, or None for a species that takes no part; ``outputs`` leaves
        ``[K, B, ...]`` or None.
    """
    runs = [
        _differentiable(trace, cost, lowering, *(vjps[i] if vjps else (None, ())))
        for i, trace in enumerate(traces)
    ]

    def step(bank: Any, slots: Any, inputs: Any) -> tuple[Any, ...]:
        return tuple(
            None if x is None else run(_take(trace, leaves, index), x, index)
            for trace, run, leaves, index, x in zip(
                traces, runs, bank, slots, inputs, strict=True
            )
        )

    return step


def is_leaf_stacked(leaf: Any, spec: jax.ShapeDtypeStruct) -> bool:
    """Return whether a bank leaf has a slot axis, or is shared by all slots."""
    return np.ndim(leaf) == len(spec.shape) + 1


def evaluate(
    trace: Trace,
    params: Sequence[Any],
    inputs: Sequence[Any],
    *,
    num_slots: int,
    rows: int,
    cost: Cost,
    lowering: str,
) -> tuple[Any, ...]:
    """Run a program for K slots at once.

    Args:
        trace: the program of one slot.
        params: per parameter ``[K, ...]``, or ``[...]`` if all slots share it.
        inputs: per input ``[K, ...]``.
        num_slots: K.
        rows: B, mapped outside; only the chooser of lowerings wants to know.
        cost: the device.
        lowering: ``"auto"`` or ``"native"``.

    Returns:
        Per output ``[K, ...]``.
    """
    values = dict(enumerate((*params, *inputs)))
    stacked = {
        i: is_leaf_stacked(values[i], spec) for i, spec in enumerate(trace.specs)
    }

    def read(atom: int | Literal) -> tuple[Any, bool]:
        if isinstance(atom, Literal):
            return jnp.asarray(atom.value, atom.spec.dtype), False
        return values[atom], stacked[atom]

    for op in trace.ops:
        pairs = [read(atom) for atom in op.inputs]
        operands, flags = [v for v, _ in pairs], [s for _, s in pairs]
        if any(flags):
            name = _lower.choose(
                op, flags, num_slots=num_slots, rows=rows, cost=cost, mode=lowering
            )
            outs = _lower.apply(name, op, operands, flags)
        else:
            outs = op.bind_fn(*operands)
        for number, out in zip(op.outputs, outs, strict=True):
            values[number], stacked[number] = out, any(flags)

    def to_stack(atom: int | Literal) -> Any:
        value, is_stacked = read(atom)
        if is_stacked:
            return value
        return jnp.broadcast_to(value, (num_slots, *value.shape))

    return tuple(map(to_stack, trace.outputs))


def _take(trace: Trace, leaves: Sequence[Any], index: Any) -> tuple[Any, ...]:
    """Return the parameters of the named slots."""
    if index is None:
        return tuple(leaves)
    return tuple(
        jnp.take(x, index, axis=0, mode="clip") if is_leaf_stacked(x, spec) else x
        for x, spec in zip(leaves, trace.param_specs, strict=True)
    )


def _differentiable(
    trace: Trace,
    cost: Cost,
    lowering: str,
    vjp_fn: VjpFn | None,
    variants: tuple[int, ...],
) -> Callable[..., tuple[Any, ...]]:
    """Return ``run(params, inputs, index)`` of one species, with its derivative."""
    run_rows = functools.partial(_run_rows, trace, cost, lowering)
    if vjp_fn is None:
        return lambda params, inputs, index: run_rows(params, inputs)

    @jax.custom_vjp
    def run(params: Any, inputs: Any, index: Any) -> tuple[Any, ...]:
        return run_rows(params, inputs)

    def forward(params: Any, inputs: Any, index: Any) -> Any:
        return run_rows(params, inputs), (params, inputs, index)

    def backward(residuals: Any, cotangents: Any) -> Any:
        params, inputs, index = residuals
        pairs = zip(cotangents, trace.out_specs, strict=True)
        moving = tuple(c for c, spec in pairs if is_inexact(spec))
        params, inputs, moving = _differentiate_once((params, inputs, moving))
        num_slots, rows = inputs[0].shape[:2]
        size = {"num_slots": num_slots, "rows": 1}  # its rows are inside
        operands = (*inputs, *moving) if trace.input_specs else moving
        results = [
            evaluate(vjp, params, operands, **size, cost=cost, lowering=lowering)
            for vjp in vjp_fn(rows)
        ]
        grads = _select(results, variants, index)
        return _cotangents(trace, params, inputs, grads)

    run.defvjp(forward, backward)
    return run


def _run_rows(
    trace: Trace, cost: Cost, lowering: str, params: Any, inputs: Any
) -> tuple[Any, ...]:
    """Run a program for K slots of B rows each."""
    num_slots, rows = inputs[0].shape[:2]

    def one_row(params: Any, row: Any) -> tuple[Any, ...]:
        # A job without inputs still has rows: a bare carrier brings them.
        row = row if trace.input_specs else ()
        size = {"num_slots": num_slots, "rows": rows}
        return evaluate(trace, params, row, **size, cost=cost, lowering=lowering)

    return jax.vmap(one_row, in_axes=(None, 1), out_axes=1)(params, inputs)


def _select(results: Any, variants: tuple[int, ...], index: Any) -> tuple[Any, ...]:
    """Return each slot's gradients from the variant of the derivative that it has."""
    if len(results) == 1:
        return results[0]
    table = np.asarray(variants, np.int32)
    chosen = table if index is None else jnp.asarray(table)[index]

    def pick(*xs: Any) -> Any:
        picked = xs[0]
        for i, x in enumerate(xs[1:], 1):
            mask = jnp.reshape(chosen == i, (-1,) + (1,) * (x.ndim - 1))
            picked = jnp.where(mask, x, picked)
        return picked

    return tuple(map(pick, *results))


def _cotangents(trace: Trace, params: Any, inputs: Any, grads: Any) -> Any:
    """Return the cotangents of ``(params, inputs, index)``; None is zero.

    A leaf that all slots share gets the sum over slots.
    """
    num_own = trace.num_params - len(trace.consts)
    left = iter(grads)
    of_params: list[Any] = [None] * len(params)
    for i, (leaf, spec) in enumerate(zip(params, trace.param_specs, strict=True)):
        if i < num_own and is_inexact(spec):
            grad = next(left)
            of_params[i] = grad if is_leaf_stacked(leaf, spec) else grad.sum(0)
    of_inputs = [
        next(left) if is_inexact(spec) else None for spec in trace.input_specs
    ] or [None]
    return tuple(of_params), tuple(of_inputs), None


@jax.custom_jvp
def _differentiate_once(values: Any) -> Any:
    return values


@_differentiate_once.defjvp
def _refuse_second_order(primals: Any, tangents: Any) -> Any:
    raise StfuseError(
        "`stfuse.Fused`: found a second derivative; only first order, reverse mode "
        "(`jax.grad`, `jax.vjp`) is fused. Differentiate `job.apply_fn` itself twice."
    )
