"""fuse: jobs to one callable that answers for all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stfuse import _bank, _cost, _lower, _options
from stfuse._align import align
from stfuse._bank import Bank
from stfuse._cache import next_power_of_two
from stfuse._errors import JobError, RequestError
from stfuse._inputs import Checked, check_inputs
from stfuse._job import Job
from stfuse._layout import Buffer, lay_out
from stfuse._plan import Plan, Species, group
from stfuse._program import Trace
from stfuse._stacked import Stacked, StackedOutputs, cut, fill, resized, to_host
from stfuse._step import make_step
from stfuse._trace import trace, trace_vjp
from stfuse._tuned import TunedStep
from stfuse._types import Cost


def fuse(
    jobs: Sequence[Job],
    *,
    max_waste: float | None = None,
    lowering: str = "auto",
    cost: str | Cost = "auto",
) -> Fused:
    """Fuse jobs into one step: ``map`` with fewer kernels.

    Jobs with equal programs share every launch. Jobs that differ share those launches
    that cost less together, padded to the largest, than apart. Either way
    ``fuse(jobs)(bank, inputs)[name]`` equals ``jobs[name].apply_fn(params[name],
    inputs[name])``.

    Args:
        jobs: one or more `Job`, with names that differ.
        max_waste: most padded work over true work, minus one, of any launch; None
            leaves it to the cost model. Equal jobs waste nothing.
        lowering: how launches are computed. ``"auto"`` measures the ways on the live
            device, if ``cost`` is of it, within a budget, and remembers on disk;
            ``"heuristic"`` never measures; ``"native"`` always maps the primitive.
        cost: ``"auto"`` (measured on the live device), ``"h200"``, ``"cpu"`` or a
            `Cost`. Planning for a device that is not here still gives exact answers.

    Returns:
        The fused callable.

    Raises:
        JobError: no jobs, something that is no `Job`, or two of one name.
        ValueError: an option is out of range.

    Source:
        Jain et al., Dynamic Space-Time Scheduling for GPU Inference, 2018,
        arXiv:1901.00041, section 3 (inter-model kernel merging).

    Example:
        >>> def linear(w, x):
        ...     return x @ w
        >>> x = np.ones((1, 2), "f")
        >>> weights = {"a": np.zeros((2, 2), "f"), "b": np.ones((2, 2), "f")}
        >>> jobs = [Job(name, linear, w, x) for name, w in weights.items()]
        >>> fused = fuse(jobs, cost="cpu")
        >>> bank = fused.pack()
        >>> fused(bank, {"a": x, "b": x})["b"].tolist()
        [[2.0, 2.0]]
        >>> fused.plan.num_launches
        1
    """
    if not isinstance(jobs, Iterable):
        found = type(jobs).__name__
        raise JobError(f"`stfuse.fuse`: found a {found}; pass a list of `stfuse.Job`s.")
    jobs = tuple(jobs)
    for job in jobs:
        if not isinstance(job, Job):
            found = type(job).__name__
            raise JobError(f"`stfuse.fuse`: found a {found}; pass `stfuse.Job`s.")
    names = [job.name for job in jobs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if not jobs or twice:
        what = f"the names {twice} twice" if twice else "no jobs"
        raise JobError(
            f"`stfuse.fuse`: found {what}; pass one or more jobs, each named once.",
            jobs=tuple(twice),
        )
    if max_waste is not None and not (_options.is_real(max_waste) and max_waste >= 0):
        raise ValueError(
            f"`stfuse.fuse`: max_waste is {max_waste!r}; pass a number >= 0, or None."
        )
    if lowering not in _lower.LOWERINGS:
        raise ValueError(
            f"`stfuse.fuse`: lowering is {lowering!r}; pass one of {_lower.LOWERINGS}."
        )
    return Fused(jobs, max_waste, lowering, _cost.resolve(cost))


class Fused:
    """The fused step of some jobs. Made by `fuse`; holds no arrays but the jobs' own.

    Attributes:
        jobs: the jobs by name, in the order they were given.
        plan: which launches they share.
    """

    def __init__(
        self,
        jobs: tuple[Job, ...],
        max_waste: float | None,
        lowering: str,
        cost: Cost,
    ) -> None:
        """Trace, plan and build the step; nothing is compiled yet."""
        self.jobs: Mapping[str, Job] = {job.name: job for job in jobs}
        # A job of variable length is one program for each of its lengths.
        self._programs = [
            (job.name, length, program)
            for job in jobs
            for length, program in enumerate(job.programs)
        ]
        traces = [trace(p) for _, _, p in self._programs]
        species = group(traces)
        bank_of = self._bank_of(species)
        sizes = [len(one.members) for one in species]
        shares = _bank.marks(self._columns(species), sizes, bank_of)
        plan = align(
            self._labels(),
            traces,
            cost,
            max_waste=max_waste,
            shares=shares,
            banks=bank_of,
            is_concurrent=cost.source != "cpu",  # as `TunedStep` has it compiled
        )
        self._species = plan.species
        self._where = self._slots_of()
        first = [species[bank_of.index(b)] for b in range(max(bank_of) + 1)]
        capacities = [len(one.members) for one in first]
        self._layout = lay_out(plan, bank_of, capacities, shares)
        alone, held = _bank.num_bytes(self._layout, self._columns(first))
        self.plan: Plan = dataclasses.replace(
            _lower.lower_plan(plan, lowering),
            param_bytes_alone=alone,
            param_bytes=held,
        )
        vjps = [self._vjps(s) for s in range(len(plan.species))]
        build_fn = functools.partial(
            make_step, plan, self._layout, cost=cost, vjps=vjps
        )
        self._step = TunedStep(
            lambda mode: build_fn(lowering=mode), self.plan, lowering
        )

    def pack(self, params: Mapping[str, Any] | None = None) -> Bank:
        """Stack the jobs' parameters on the device.

        The parameters themselves, also where a job only reads casts of them (the engine
        keeps the casts): gradients are taken of the bank and applied to it.

        Args:
            params: ``{name: params}`` to use instead of the jobs' own; may name some.

        Returns:
            The bank: per leaf one array, ``[J, ...]``, or ``[...]`` if all share it.

        Raises:
            JobError: an unknown name, or params unlike the job's.
        """
        params = dict(params or {})
        for name in params:
            self._job("stfuse.Fused.pack", name)
        columns: dict[int, Any] = {}
        for one, b in zip(self._species, self._layout.bank_of, strict=True):
            if b not in columns:
                columns[b] = []
                for member in one.members:
                    name, length, _ = self._programs[member]
                    own = params.get(name, self.jobs[name].params)
                    columns[b].append(self._leaves(name, length, own))
        return _bank.pack(self._layout, list(columns.values()))

    def swap(self, bank: Bank, name: str, new_params: Any) -> Bank:
        """Return the bank with one job's parameters replaced; the old one stays valid.

        Nothing is recompiled, unless a leaf that all jobs shared stops being equal:
        it gets slots then, and the next call compiles once for that.

        Args:
            bank: from `pack` or `swap`.
            name: the job.
            new_params: pytree like the job's params.

        Returns:
            The new bank.

        Raises:
            JobError: an unknown name, or params unlike the job's.
        """
        self._job("stfuse.Fused.swap", name)
        # Programs that share a bank hold the job in the same slot of it: write once.
        banks = self._layout.bank_of
        last = {banks[s]: at for at, (s, _) in enumerate(self._where[name])}
        for b, length in last.items():
            new = self._leaves(name, length, new_params)
            slot = self._where[name][length][1]
            bank = _bank.unshare(self._layout, bank, b, new)
            bank = _bank.write(self._layout, bank, b, slot, new)
        return bank

    def stack(self, inputs: Mapping[str, Any]) -> Stacked:
        """Stage inputs as the step takes them: one buffer per input leaf.

        Rows are padded to the next power of two, and so are the slots of a subset;
        padding repeats a job's own first row, which keeps its gradient finite.

        Args:
            inputs: ``{name: inputs}`` for the jobs to answer for; rows may differ.

        Returns:
            The staged inputs; NumPy on the host unless traced.

        Raises:
            RequestError: an unknown name, or inputs unlike the job's example.
        """
        call = "stfuse.Fused.stack"
        if not isinstance(inputs, Mapping) or not inputs:
            is_map = isinstance(inputs, Mapping)
            what = "empty" if is_map else f"a {type(inputs).__name__}"
            raise RequestError(f"`{call}`: inputs is {what}; pass {{name: inputs}}.")
        found: list[dict[int, tuple[str, Checked]]] = [{} for _ in self._species]
        for name, x in inputs.items():
            job = self._job(call, name, RequestError)
            checked = check_inputs(job, x, call=call)
            s, slot = self._where[name][checked.length]
            found[s][slot] = (name, checked)
        used = [self._slots(s, members) for s, members in enumerate(found)]
        counts = {s: len(own) for s, own in enumerate(used) if own}
        slots = tuple(
            self._index(own, len(one.members))
            for own, one in zip(used, self._species, strict=True)
        )
        places = [
            (name, resized(self._layout.cut_places(counts, s, k), x.out_sizes), x.rows)
            for s, members in enumerate(found)
            for k, (_, (name, x)) in enumerate(sorted(members.items()))
        ]
        buffers = tuple(self._fill(b, found, used) for b in self._layout.inputs)
        return Stacked(slots, buffers, tuple(places))

    def step(self, bank: Bank, stacked: Stacked) -> StackedOutputs:
        """Run the fused step; pure, compiled once per shape.

        Args:
            bank: the parameters.
            stacked: from `stack`.

        Returns:
            The outputs, still stacked.
        """
        leaves = self._step(bank.stacks, stacked.slots, stacked.inputs)
        return StackedOutputs(leaves, stacked.places)

    def split(self, stacked: StackedOutputs) -> dict[str, Any]:
        """Cut a step's outputs by job.

        Args:
            stacked: from `step`.

        Returns:
            ``{name: outputs}``: NumPy arrays, or traced ones inside a transformation.
        """
        outputs = [x if x is None else to_host(x) for x in stacked.leaves]
        return {
            name: cut(outputs, places, 0, 0, rows, self.jobs[name])
            for name, places, rows in stacked.places
        }

    def __call__(self, bank: Bank, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Answer for the named jobs: `stack`, `step`, `split`.

        Works inside ``jit``, ``scan``, ``while_loop``, ``vmap`` and under ``grad``
        with respect to the bank (reverse mode, first order).

        Args:
            bank: from `pack` or `swap`.
            inputs: ``{name: inputs}`` for some or all jobs.

        Returns:
            ``{name: outputs}``, equal to each job's own.

        Raises:
            RequestError: as `stack`.
        """
        return self.split(self.step(bank, self.stack(inputs)))

    def _labels(self) -> list[str]:
        """Return what the plan calls each program."""
        return [
            f"{name}[{length}]" if self.jobs[name].by_length else name
            for name, length, _ in self._programs
        ]

    def _job(self, call: str, name: str, error: type = JobError) -> Job:
        if name not in self.jobs:
            raise error(
                f"`{call}`: found job '{name}'; it has {', '.join(self.jobs)}.",
                jobs=(str(name),),
            )
        return self.jobs[name]

    def _leaves(self, name: str, length: int, params: Any) -> list[Any]:
        """Return one program's parameters, closed-over arrays last."""
        job = self.jobs[name]
        return [*job.flatten_params(params), *trace(job.programs[length]).consts]

    def _slots_of(self) -> dict[str, list[tuple[int, int]]]:
        """Return the species and slot of each job's programs, by length."""
        where: dict[str, list[tuple[int, int]]] = {name: [] for name in self.jobs}
        places = {
            member: (s, slot)
            for s, one in enumerate(self._species)
            for slot, member in enumerate(one.members)
        }
        for i, (name, _, _) in enumerate(self._programs):
            where[name].append(places[i])
        return where

    def _columns(self, species: Sequence[Species]) -> list[list[list[Any]]]:
        """Return the jobs' own parameters, values or specs, by species and slot."""
        return [
            [
                [*jax.tree.leaves(program.params), *trace(program).consts]
                for _, _, program in (self._programs[m] for m in one.members)
            ]
            for one in species
        ]

    def _bank_of(self, species: Sequence[Species]) -> tuple[int, ...]:
        """Return whose parameters each species reads: its lengths have one bank."""
        names, columns = [], []
        for one in species:
            programs = [self._programs[m] for m in one.members]
            names.append([name for name, _, _ in programs])
            columns.append([trace(p).consts for _, _, p in programs])
        return _bank.alias(names, columns)

    def _slots(self, s: int, members: Mapping[int, Any]) -> list[int]:
        """Return which slots of a species run: those asked for, then padding."""
        used = sorted(members)
        capacity = len(self._species[s].members)
        if not used or len(used) == capacity:
            return used
        num_slots = min(next_power_of_two(len(used)), capacity)
        return used + used[:1] * (num_slots - len(used))

    def _index(self, used: Sequence[int], capacity: int) -> Any:
        if not used:
            return ()
        is_all = list(used) == list(range(capacity))
        return None if is_all else np.asarray(used, np.int32)

    def _fill(self, buffer: Buffer, found: Sequence[Any], used: Sequence[Any]) -> Any:
        """Return one staged array, or None if nobody who uses it takes part."""
        taking = [(s, leaf) for s, leaf in buffer.members if used[s]]
        if not taking:
            return None
        (component,) = [c for c in self._layout.components if taking[0][0] in c]
        rows = next_power_of_two(
            max(x.rows for s in component for _, x in found[s].values())
        )
        counts = {s: len(used[s]) for s, _ in taking}
        if taking[0][1] < 0:
            return np.zeros((buffer.num_rows(counts), rows), np.int8)
        leaves = [
            found[s][slot][1].leaves[leaf] for s, leaf in taking for slot in used[s]
        ]
        return fill(leaves, rows, buffer.shape(counts), buffer.dtype)

    def _vjps(self, s: int) -> Any:
        """Return a species' derivative programs by rows, and each slot's variant."""
        programs = [self._programs[m][2] for m in self._species[s].members]
        # Equal programs may still have custom derivatives that differ.
        functions = {id(program.jaxpr): program for program in programs}
        order = list(functions)
        variants = tuple(order.index(id(program.jaxpr)) for program in programs)

        @functools.cache
        def vjp_fn(rows: int) -> list[Trace]:
            traces = [trace_vjp(job, rows) for job in functions.values()]
            is_one = len({t.key for t in traces}) == 1
            return traces[:1] if is_one else traces

        return vjp_fn, variants
