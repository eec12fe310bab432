"""The interpreter: evaluates a plan's launches over stacked values.

Rules:
    A launch of equal ops maps the primitive over its rows; a launch of unlike ops goes
    by the primitive's padding rule (`_rules`). An op over values that all slots share
    runs once. What JAX cannot map, or maps to something else, is done row by row
    (`bind_mapped`).
    Scans of several species are one scan, whose body is evaluated the same way.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from stfuse import _lower, _regions, _rules
from stfuse._plan import Node, used_together
from stfuse._program import Literal, Op
from stfuse._regions import Item, Region, Siblings
from stfuse._rules import Merge, Stack
from stfuse._together import How, merge_of, run_together
from stfuse._trace import scan_parts, trace_body
from stfuse._values import Env, Held, assemble, read


def evaluate(env: Env, nodes: Sequence[Node], how: How) -> None:
    """Run launches in order, for the species that take part.

    Args:
        env: holds every parameter and input; every other value is added.
        nodes: the launches; members that take no part are left out.
        how: how to compute them.
    """
    for node in _order(env, nodes, how):
        if isinstance(node, Region | Siblings):
            if not run_together(env, node, how):
                evaluate(env, node.nodes, replace(how, has_regions=False))
            continue
        ops = [env.programs[s].ops[i] for s, i in node.members]
        if node.body is not None and len(ops) > 1:
            _run_loop(env, node.body, node.species, ops, how)
        else:
            _run(env, node.members, ops, how)


def _order(env: Env, nodes: Sequence[Node], how: How) -> Sequence[Item]:
    """Return the launches of those who take part, some of them as regions."""
    own = []
    for node in nodes:
        members = tuple(m for m in node.members if m[0] in env.programs)
        if members:
            own.append(replace(node, members=members))
    may_join = how.has_regions and how.probe is None
    if may_join and _regions.are_used(how.cost, how.lowering):
        return _regions.schedule(env.programs, own)
    return own


def _run_indexed(
    env: Env, members: Sequence[tuple[int, int]], ops: Sequence[Op], how: How
) -> bool:
    """Run a product on weights that are not gathered, if there is a way.

    Returns:
        Whether it was run.
    """
    if len(ops[0].inputs) != 2 or how.lowering == "native":
        return False
    species = [s for s, _ in members]
    named = _named(env, [(s, op.inputs[1]) for s, op in zip(species, ops, strict=True)])
    if named is None:
        return False
    held, index = named
    wide = _rules.widen(ops)
    num_slots, spec = held.array.shape[0], wide.in_specs[1]
    if held.shape != tuple(spec.shape) or not _lower.can_index(wide, num_slots):
        return False

    def compute(op: Op, arrays: Sequence[Any], flags: Sequence[bool]) -> Any:
        x, stack = arrays
        return _lower.indexed(op, x, stack, index)

    merge = Merge(tuple(ops), tuple(env.counts[s] for s in species), wide, compute)
    rows = [(s, op.inputs[0]) for s, op in zip(species, ops, strict=True)]
    own = [op.in_specs[0] for op in ops]
    x = _rules.to_stacked(read(env, rows, own, wide.in_specs[0].shape))
    sizes = merge.per_row(lambda op: op.in_specs[1].shape)
    (y,) = _rules.launch(merge, [x, Stack(held.array, True, sizes, held.clean)])
    env.put(species, [op.outputs[0] for op in ops], y)
    return True


def _named(env: Env, values: Sequence[tuple[int, Any]]) -> tuple[Held, Any] | None:
    """Return the stack that holds values not gathered yet, and which rows they are.

    None if they do not stand in one stack, in order.
    """
    if any(isinstance(atom, Literal) for _, atom in values):
        return None
    held = env.values[values[0]]
    start = at = held.starts[values[0][0]]
    for s, atom in values:
        if env.values[s, atom] is not held or held.starts[s] != at:
            return None
        at += env.counts[s]
    if held.index is None:
        return None
    return held, held.index[start:at]


def _run(
    env: Env, members: Sequence[tuple[int, int]], ops: Sequence[Op], how: How
) -> None:
    """Run one launch."""
    if _run_indexed(env, members, ops, how):
        return
    species = [s for s, _ in members]
    wide = _rules.widen(ops)
    merge = merge_of(env, species, ops, wide, how)
    operands = [
        read(
            env,
            [(s, op.inputs[p]) for s, op in zip(species, ops, strict=True)],
            [op.in_specs[p] for op in ops],
            spec.shape,
        )
        for p, spec in enumerate(wide.in_specs)
    ]
    if how.probe is not None:
        operands = list(map(how.probe.operand, operands))
    outs = _rules.launch(merge, operands)
    if how.probe is not None:
        how.probe.launched(merge, members, operands, outs)
    for k, x in enumerate(outs):
        env.put(species, [op.outputs[k] for op in ops], x)


def _run_loop(
    env: Env, body: Sequence[Node], species: Sequence[int], ops: Sequence[Op], how: How
) -> None:
    """Run scans of several species as one, their bodies aligned.

    A species whose scan is shorter keeps its carries once it is through.
    """
    loop = _Loop(env, body, dict(zip(species, ops, strict=True)), how)
    carries, xs = loop.first_carries(), loop.stacked_xs()
    turns = np.arange(loop.length, dtype=np.int32)
    carries, ys = lax.scan(
        loop.turn,
        carries,
        (turns, xs),
        length=loop.length,
        reverse=ops[0].params["reverse"],
        unroll=_lower.unroll_of(ops, how.cost, how.lowering),
    )
    loop.keep(carries, ys)


class _Loop:
    """Scans of several species on their way through one."""

    def __init__(
        self, env: Env, body: Sequence[Node], ops: Mapping[int, Op], how: How
    ) -> None:
        self.env, self.body, self.ops, self.how = env, body, ops, how
        self.inner = {s: trace_body(op) for s, op in ops.items()}
        self.parts = {s: scan_parts(op) for s, op in ops.items()}
        self.lengths = {s: op.params["length"] for s, op in ops.items()}
        self.length = max(self.lengths.values())
        self.carries = self._grouped(1)
        self.xs = self._grouped(2)
        self.ys: list[tuple[tuple[tuple[int, int], ...], Held]] = []
        for s, op in ops.items():  # gathered here, once, and not at every turn
            for atom in op.inputs[: self.parts[s][0]]:
                if not isinstance(atom, Literal):
                    env.held((s, atom))

    def _grouped(self, kind: int) -> list[tuple[tuple[int, int], ...]]:
        """Return which carries (or xs) of which species stand in one stack."""
        wanted = {}
        for s, parts in self.parts.items():
            start = sum(parts[:kind])
            wanted[s] = range(start, start + parts[kind])
        first = {s: self.inner[s].num_params for s in self.inner}
        numbers = {s: [first[s] + q for q in qs] for s, qs in wanted.items()}
        groups = used_together(self.inner, self.body, numbers)
        return [tuple((s, v - first[s]) for s, v in group) for group in groups]

    def _outer(self, group: Sequence[tuple[int, int]]) -> Stack:
        """Return what the scans were given for some of their operands."""
        values = [(s, self.ops[s].inputs[q]) for s, q in group]
        specs = [self.ops[s].in_specs[q] for s, q in group]
        return assemble(self.env, values, specs)

    def first_carries(self) -> list[Any]:
        """Return the carries that the loop starts with, one array per group."""
        return [self._outer(group).array for group in self.carries]

    def stacked_xs(self) -> list[Any]:
        """Return the xs, ``[T, R, ...]`` per group, T of the longest scan."""
        found = []
        for group in self.xs:
            x = jnp.moveaxis(self._outer(group).array, 1, 0)
            if len(x) < self.length:
                more = [(0, self.length - len(x)), *[(0, 0)] * (x.ndim - 1)]
                x = jnp.pad(x, more)
            found.append(x)
        return found

    def _entered(self, carries: Sequence[Any], xs: Sequence[Any]) -> Env:
        """Return the values that a turn of the body starts with."""
        env = Env(self.inner, {s: self.env.counts[s] for s in self.inner})
        for group, array in zip(
            (*self.carries, *self.xs), (*carries, *xs), strict=True
        ):
            held = Held(
                array,
                True,
                (False,) * (array.ndim - 1),
                env.starts([s for s, _ in group]),
            )
            for s, q in group:
                env.values[s, self.inner[s].num_params + q] = held
        for s, op in self.ops.items():
            inner = self.inner[s]
            for v, const in enumerate(inner.consts):
                env.values[s, v] = _alone(s, jnp.asarray(const))
            for q in range(self.parts[s][0]):
                atom = op.inputs[q]
                env.values[s, inner.num_params + q] = (
                    _alone(s, jnp.asarray(atom.value, atom.spec.dtype))
                    if isinstance(atom, Literal)
                    else self.env.held((s, atom))
                )
        return env

    def turn(self, carries: Any, x: Any) -> tuple[Any, Any]:
        """Run the body once for all species."""
        t, xs = x
        env = self._entered(carries, xs)
        evaluate(env, self.body, self.how)
        after = []
        for group, before in zip(self.carries, carries, strict=True):
            places = [(s, q - self.parts[s][0]) for s, q in group]
            new = self._results(env, places).array.astype(before.dtype)
            after.append(self._frozen(t, group, before, new))
        return after, self._collect(env)

    def _results(self, env: Env, places: Sequence[tuple[int, int]]) -> Stack:
        values = [(s, self.inner[s].outputs[k]) for s, k in places]
        specs = [self.inner[s].out_specs[k] for s, k in places]
        return assemble(env, values, specs)

    def _frozen(self, t: Any, group: Any, before: Any, new: Any) -> Any:
        """Keep the carries of those who are through."""
        lengths = [self.lengths[s] for s, _ in group]
        if min(lengths) == self.length:
            return new
        counts = [self.env.counts[s] for s, _ in group]
        runs = t < np.repeat(np.asarray(lengths, np.int32), counts)
        return jnp.where(runs.reshape(-1, *(1,) * (new.ndim - 1)), new, before)

    def _collect(self, env: Env) -> list[Any]:
        """Return the ys of a turn, one array for each that the body left them in."""
        found: dict[Hashable, list[tuple[int, int]]] = {}
        for s, inner in self.inner.items():
            for k in range(self.parts[s][1], len(inner.outputs)):
                atom = inner.outputs[k]
                key: Hashable = (s, k)
                if not isinstance(atom, Literal):
                    key = id(env.values[s, atom])
                    if any(s == other for other, _ in found.get(key, ())):
                        key = (s, k)  # the same value twice
                found.setdefault(key, []).append((s, k))
        groups = list(map(tuple, found.values()))
        stacks = [self._results(env, group) for group in groups]
        self.ys = [
            (group, Held(None, True, x.clean, env.starts([s for s, _ in group])))
            for group, x in zip(groups, stacks, strict=True)
        ]
        return [x.array for x in stacks]

    def keep(self, carries: Sequence[Any], ys: Sequence[Any]) -> None:
        """Write the loop's results where the rest of the program finds them."""
        for group, array in zip(self.carries, carries, strict=True):
            starts = self.env.starts([s for s, _ in group])
            held = Held(array, True, (False,) * (array.ndim - 1), starts)
            for s, q in group:
                place = q - self.parts[s][0]
                self.env.values[s, self.ops[s].outputs[place]] = held
        for (group, held), array in zip(self.ys, ys, strict=True):
            clean = (False, *held.clean)
            held = replace(held, array=jnp.moveaxis(array, 0, 1), clean=clean)
            for s, k in group:
                self.env.values[s, self.ops[s].outputs[k]] = held


def _alone(s: int, array: Any) -> Held:
    return Held(array, False, (False,) * array.ndim, {s: 0})
