"""How one stacked launch is computed fast: candidates per family, and the chooser.

A candidate computes the op of one job; it is mapped over the slots. Two ways apply to
every op: ``native`` maps the primitive itself, ``unrolled`` computes slot by slot.

Which one is taken is measured on the live device if the plan is for it and time is
left (`_measure`), else looked up in a small table of what measurements have shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from stfuse import _rules
from stfuse._lower import _conv, _conv_kernel, _dot, _indexed, _measure, _scan
from stfuse._plan import Plan
from stfuse._program import Op
from stfuse._types import Cost

LOWERINGS = ("auto", "heuristic", "native")
# Patches win on a GPU at every size measured; on a CPU while a slot's patches stay in
# cache (16 jobs, 3x3: 36 KiB of patches 172 us against 209 unrolled; 295 KiB 1495
# against 893).
_CPU_PATCH_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to compute the ops of one family.

    Attributes:
        fits: whether it can compute an op at a number of rows.
        compute: ``(op, *operands) -> outputs`` of one job.
        is_whole: whether it computes the whole stack instead.
    """

    fits: Callable[[Op, int], bool]
    compute: Callable[..., tuple[Any, ...]]
    is_whole: bool = False


_CANDIDATES: dict[str, dict[str, Candidate]] = {
    "conv_general_dilated": {
        "patches": Candidate(lambda op, rows: _conv.is_patchable(op), _conv.patches),
        "shifted": Candidate(
            lambda op, rows: _conv.is_patchable(op) and _conv.num_taps(op) > 1,
            _conv.shifted_products,
        ),
        "kernel": Candidate(_conv_kernel.fits, _conv_kernel.conv, is_whole=True),
        "scaled": Candidate(
            lambda op, rows: _conv.is_depthwise(op), _conv.shifted_scales
        ),
    },
    "dot_general": {
        "swapped": Candidate(lambda op, rows: True, _dot.swapped),
        "padded": Candidate(_dot.is_ragged, _dot.padded),
        "multiply_reduce": Candidate(_dot.has_few_rows, _dot.multiply_reduce),
    },
    "scan": {
        "turns": Candidate(
            lambda op, rows: _scan.steps_per_turn([op]) > op.params["unroll"],
            _scan.in_turns,
        ),
    },
}


def candidates(
    op: Op, is_stacked: Sequence[bool], rows: int, num_slots: int
) -> tuple[str, ...]:
    """Return the names of all ways to compute a stacked op."""
    family = _CANDIDATES.get(op.name, {})
    found = [name for name, one in family.items() if one.fits(op, rows)]
    if op.name == "scan":
        return ("native", *found)
    if not family or num_slots == 1:
        return ("native",)
    if not is_stacked[1]:  # a shared kernel or matrix: slots are more rows of one op
        return ("native",)
    return ("native", "unrolled", *found)


def choose(
    op: Op,
    is_stacked: Sequence[bool],
    *,
    num_slots: int,
    rows: int,
    cost: Cost,
    mode: str,
) -> str:
    """Return the name of the way to compute a stacked op.

    Args:
        op: the op of one job at one row.
        is_stacked: per operand, whether it differs by slot.
        num_slots: K.
        rows: B; the row mapping hides them from the op's own shapes.
        cost: the device.
        mode: one of `LOWERINGS`, or ``"known"``: what has been measured, without
            measuring now, as while others are served; ``"plain"`` likewise.
    """
    names = candidates(op, is_stacked, rows, num_slots)
    if mode == "native" or names == ("native",):
        return "native"
    guess = _guess(op, names, rows, cost)
    if op.name == "scan":  # compiled for longer than it would be measured
        return guess
    if mode != "heuristic" and _measure.is_worth(op, num_slots * rows, cost):
        ways = {
            name: functools.partial(apply, name, op, is_stacked=is_stacked)
            for name in names
        }
        size = (num_slots, rows)
        is_timed = mode == "auto"
        return _measure.fastest(ways, op, is_stacked, size, guess, is_timed=is_timed)
    return guess


def _guess(op: Op, names: Sequence[str], rows: int, cost: Cost) -> str:
    """Return what past measurements say."""
    is_cpu = cost.source == "cpu"
    if op.name == "dot_general" or (op.name == "scan" and is_cpu):
        return "native"
    if "turns" in names:
        return "turns"
    if "scaled" in names:
        return "scaled"
    if "kernel" in names and not is_cpu:
        return "kernel"
    if "patches" not in names:
        return "unrolled" if is_cpu else "native"
    if is_cpu and rows * _conv.patch_bytes(op) > _CPU_PATCH_BYTES:
        return "unrolled"
    return "patches"


def apply(
    name: str, op: Op, operands: Sequence[Any], is_stacked: Sequence[bool]
) -> tuple[Any, ...]:
    """Compute a stacked op.

    Args:
        name: what `choose` returned.
        op: the op of one job.
        operands: ``[K, ...]`` where stacked, else as for one job.
        is_stacked: per operand.

    Returns:
        Outputs ``[K, ...]``.
    """
    if name == "unrolled":
        return _unrolled(op, operands, is_stacked)
    axes = [0 if s else None for s in is_stacked]
    if name == "native":
        if _is_level(op, operands, is_stacked):
            return op.bind_fn(*operands)
        return jax.vmap(op.bind_fn, in_axes=axes)(*operands)
    way = _CANDIDATES[op.name][name]
    if way.is_whole:
        (num_slots,) = {x.shape[0] for x, s in zip(operands, is_stacked) if s}  # noqa: B905
        whole = [
            x if s else jnp.broadcast_to(x, (num_slots, *x.shape))
            for x, s in zip(operands, is_stacked, strict=True)
        ]
        return way.compute(op, *whole)
    return jax.vmap(lambda *xs: way.compute(op, *xs), in_axes=axes)(*operands)


def _is_level(op: Op, operands: Sequence[Any], is_stacked: Sequence[bool]) -> bool:
    """Return whether an op is on stacks what it is on rows: to map it takes longer."""
    if op.name not in _rules.ELEMENTWISE:
        return False
    stacked = [x for x, s in zip(operands, is_stacked, strict=True) if s]
    if len({x.shape for x in stacked}) != 1:
        return False
    # A number for all beside rows that are numbers too: not every primitive takes it.
    others = [x for x, s in zip(operands, is_stacked, strict=True) if not s]
    is_mixed = len(op.specs) == 1 and stacked[0].ndim > 1
    return not others or (is_mixed and not any(map(jnp.ndim, others)))


def _unrolled(
    op: Op, operands: Sequence[Any], is_stacked: Sequence[bool]
) -> tuple[Any, ...]:
    num_slots = next(x.shape[0] for x, s in zip(operands, is_stacked, strict=True) if s)
    outs = [
        op.bind_fn(*(x[k] if s else x for x, s in zip(operands, is_stacked)))  # noqa: B905
        for k in range(num_slots)
    ]
    return tuple(jnp.stack(column) for column in zip(*outs, strict=True))


def unroll_of(ops: Sequence[Op], cost: Cost, mode: str) -> int:
    """Return how many steps a turn of several scans takes that run as one loop."""
    if mode == "native" or cost.source == "cpu":
        return min(op.params["unroll"] for op in ops)
    return _scan.steps_per_turn(ops)


def can_index(op: Op, num_slots: int) -> bool:
    """Return whether a product can read its weights from a stack of more slots."""
    return _indexed.fits(op, num_slots)


def indexed(op: Op, lhs: Any, stack: Any, index: Any) -> tuple[Any]:
    """Compute a product of named slots; nothing is gathered.

    Args:
        op: the product of one job.
        lhs: ``[K, ...]``.
        stack: weights of all slots, ``[S, ...]``.
        index: ``[K]``, the named slots.
    """
    return _indexed.dot(op, lhs, stack, index)


def lower_plan(plan: Plan, mode: str) -> Plan:
    """Return a plan with its lowerings filled in, as at one row of every slot.

    Nothing is measured for it: the step itself is, when it is compiled.
    """
    launches = iter(plan.launches)
    chosen = []
    for node in plan.nodes:
        ops = [plan.species[s].trace.ops[i] for s, i in node.members]
        if not ops[0].is_heavy:
            continue
        if node.body is not None:  # of several species
            asked = min(op.params["unroll"] for op in ops)
            is_longer = unroll_of(ops, plan.cost, mode) > asked
            name = "turns" if is_longer else "native"
        else:
            name = choose(
                _rules.widen(ops),
                [True] * len(ops[0].inputs),
                num_slots=sum(len(plan.species[s].members) for s in node.species),
                rows=1,
                cost=plan.cost,
                mode="native" if mode == "native" else "heuristic",
            )
        chosen.append(replace(next(launches), lowering=name))
    return replace(plan, launches=tuple(chosen))
