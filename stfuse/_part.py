"""The species of a component that take part in a step: parameters, rows, outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stfuse import _bank
from stfuse._bank import is_stacked
from stfuse._evaluate import evaluate
from stfuse._layout import Buffer, Layout
from stfuse._plan import Plan
from stfuse._program import Trace
from stfuse._together import How
from stfuse._types import Cost
from stfuse._values import Env, Held, assemble


@dataclass(frozen=True, slots=True)
class _View:
    """Parameters as a step uses them: one array.

    Attributes:
        array: which array of the bank it comes from.
        members: ``(species, leaf)`` in the order of its rows.
    """

    array: int
    members: tuple[tuple[int, int], ...]


class Part:
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

    def views(self, stacks: Mapping[int, Any], slots: Mapping[int, Any]) -> list[Any]:
        """Return the parameters of the named slots, one array per view."""
        return [
            x if index is None else jnp.take(x, index, axis=0, mode="clip")
            for x, index, _ in self.named(stacks, slots)
        ]

    def named(
        self,
        stacks: Mapping[int, Any],
        slots: Mapping[int, Any],
        shelves: Mapping[int, Any] | None = None,
    ) -> list[tuple[Any, Any, Any]]:
        """Return per view an array, which of its rows are meant, and its shelf.

        Rows are None for all; a shelf is None if there is none, or if only some rows
        are meant.
        """
        found = []
        for view in self.params:
            array, index = self._named(view, stacks[view.array], slots)
            shelf = (shelves or {}).get(view.array) if index is None else None
            found.append((array, index, shelf))
        return found

    def _named(
        self, view: _View, stack: Any, slots: Mapping[int, Any]
    ) -> tuple[Any, Any]:
        buffer = self.layout.params[view.array]
        if not is_stacked(stack, buffer):
            return stack, None
        starts = buffer.starts(dict(enumerate(self.layout.capacities)))
        index, is_whole, at = [], True, 0
        for s, _ in view.members:
            bank = self.layout.bank_of[s]
            is_whole = is_whole and slots[s] is None and starts[bank] == at
            own = np.arange(self.counts[s]) if slots[s] is None else slots[s]
            index.append(own + np.int32(starts[bank]))
            at += self.counts[s]
        if is_whole and at == stack.shape[0]:
            return stack, None
        return stack, jnp.concatenate(index)

    def env(
        self, programs: Mapping[int, Trace], named: Sequence[tuple[Any, Any, Any]]
    ) -> Env:
        """Return an evaluation's values: parameters only."""
        env = Env(programs, self.counts)
        for view, (array, index, shelf) in zip(self.params, named, strict=True):
            stacked = is_stacked(array, self.layout.params[view.array])
            ndim = array.ndim - stacked
            starts = env.starts([s for s, _ in view.members])
            within = None
            if shelf is not None and stacked:
                _, k = self.layout.array_of(view.array)
                within = shelf.reshape(-1, *array.shape[1:]), k * array.shape[0], 0
            held = Held(array, stacked, (True,) * ndim, starts, index, within)
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
        self, cost: Cost, lowering: str, named: Sequence[Any], inputs: Sequence[Any]
    ) -> list[Any]:
        """Run the programs over all rows of all slots."""
        how = How(inputs[0].shape[1], cost, lowering)

        def one_row(named: Any, row: Any) -> list[Any]:
            env = self.env(self.traces, named)
            self.enter(env, row)
            evaluate(env, self.plan.nodes, how)
            return self.leave(env)

        return jax.vmap(one_row, in_axes=(None, 1), out_axes=1)(named, list(inputs))

    def run_apart(
        self, cost: Cost, named: Sequence[Any], inputs: Sequence[Any]
    ) -> list[Any]:
        """Run each slot's program by itself, as `run_rows` does all of them."""
        views = [
            x if i is None else jnp.take(x, i, 0, mode="clip") for x, i, _ in named
        ]
        found: dict[tuple[int, int], list[Any]] = {}
        for s, count in self.counts.items():
            for k in range(count):
                own = self._run_slot(s, k, cost, views, inputs)
                for leaf, x in enumerate(own):
                    found.setdefault((s, leaf), []).append(x)
        outputs = []
        for i in self.outputs:
            buffer = self.layout.outputs[i]
            shape = buffer.shape(self.counts)
            rows = [x for member in self.taking(buffer) for x in found[member]]
            outputs.append(jnp.stack([_bank.padded(x, shape, 1) for x in rows]))
        return outputs

    def _run_slot(
        self, s: int, k: int, cost: Cost, views: Sequence[Any], inputs: Sequence[Any]
    ) -> list[Any]:
        """Return one slot's outputs, ``[B, ...]``, at their true shapes."""
        trace = self.traces[s]
        given: dict[int, Any] = {}
        rows: dict[int, Any] = {}
        for view, array in zip(self.params, views, strict=True):
            stacked = is_stacked(array, self.layout.params[view.array])
            for leaf, row in self._slot_row(view.members, s, k):
                given[leaf] = array[row] if stacked else array
        for i, array in zip(self.inputs, inputs, strict=True):
            members = self.taking(self.layout.inputs[i])
            for leaf, row in self._slot_row(members, s, k):
                bare = len(trace.specs)
                v = bare if leaf < 0 else trace.num_params + leaf
                rows[v] = array[row]

        def one_row(row: Any) -> list[Any]:
            env = Env({s: trace}, {s: 1})
            for v, x in (*given.items(), *row.items()):
                if v < len(trace.specs):  # else a bare carrier of rows
                    env.values[s, v] = Held(x, False, (True,) * x.ndim, {s: 0})
            evaluate(env, self.plan.nodes, How(1, cost, "native"))
            pairs = zip(trace.outputs, trace.out_specs, strict=True)
            return [assemble(env, [(s, v)], [spec]).array[0] for v, spec in pairs]

        return jax.vmap(one_row)(rows)

    def _slot_row(
        self, members: Sequence[tuple[int, int]], s: int, k: int
    ) -> list[tuple[int, int]]:
        """Return a slot's leaf and row in an array, if its species is in there."""
        at = 0
        for member, leaf in members:
            if member == s:
                return [(leaf, at + k)]
            at += self.counts[member]
        return []
