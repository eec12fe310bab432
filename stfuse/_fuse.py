"""fuse: jobs to one callable that answers for all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stfuse import _bank, _cost, _lower
from stfuse._align import Plan, align
from stfuse._bank import Bank
from stfuse._cache import next_power_of_two
from stfuse._errors import JobError, RequestError
from stfuse._inputs import Checked, check_inputs
from stfuse._job import Job
from stfuse._program import Trace
from stfuse._stacked import Place, Stacked, StackedOutputs, cut, fill, to_host
from stfuse._step import make_step
from stfuse._trace import trace, trace_vjp
from stfuse._types import Cost


def fuse(
    jobs: Sequence[Job],
    *,
    max_waste: float | None = None,
    lowering: str = "auto",
    cost: str | Cost = "auto",
) -> Fused:
    """Fuse jobs into one step: ``map`` with fewer kernels.

    Jobs with equal programs are stacked and share every launch; others run in the same
    compiled step, in stacks of their own. Either way ``fuse(jobs)(bank, inputs)[name]``
    equals ``jobs[name].apply_fn(params[name], inputs[name])``.

    Args:
        jobs: one or more `Job`, with names that differ.
        max_waste: most padded work over true work, minus one, of any launch; None
            leaves it to the cost model. Stacks of equal jobs waste nothing.
        lowering: ``"auto"`` picks how each launch is computed for the device of
            ``cost``; ``"native"`` always maps the primitive itself.
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
    if max_waste is not None and not max_waste >= 0:
        raise ValueError(
            f"`stfuse.fuse`: max_waste is {max_waste!r}; pass a number >= 0, or None."
        )
    if lowering not in _lower.LOWERINGS:
        raise ValueError(
            f"`stfuse.fuse`: lowering is {lowering!r}; pass one of {_lower.LOWERINGS}."
        )
    return Fused(jobs, lowering, _cost.resolve(cost))


class Fused:
    """The fused step of some jobs. Made by `fuse`; holds no arrays but the jobs' own.

    Attributes:
        jobs: the jobs by name, in the order they were given.
        plan: which launches they share.
    """

    def __init__(self, jobs: tuple[Job, ...], lowering: str, cost: Cost) -> None:
        """Trace, plan and build the step; nothing is compiled yet."""
        self.jobs: Mapping[str, Job] = {job.name: job for job in jobs}
        # A job of variable length is one program for each of its lengths.
        self._programs = [
            (job.name, length, program)
            for job in jobs
            for length, program in enumerate(job.programs)
        ]
        labels = [
            f"{name}[{length}]" if self.jobs[name].by_length else name
            for name, length, _ in self._programs
        ]
        plan = align(labels, [trace(p) for _, _, p in self._programs], cost)
        self._species = plan.species
        self._where: dict[str, list[tuple[int, int]]] = {name: [] for name in self.jobs}
        where = {
            member: (s, slot)
            for s, one in enumerate(plan.species)
            for slot, member in enumerate(one.members)
        }
        for i, (name, _, _) in enumerate(self._programs):
            self._where[name].append(where[i])
        self._stack_of = self._stacks()
        self.plan: Plan = self._with_lowerings(plan, lowering)
        step = make_step(
            [one.trace for one in plan.species],
            cost=cost,
            lowering=lowering,
            vjps=[self._vjps(s) for s in range(len(plan.species))],
        )

        def run(stacks: Any, slots: Any, inputs: Any) -> Any:
            return step(tuple(stacks[i] for i in self._stack_of), slots, inputs)

        self._step = jax.jit(run)

    def pack(self, params: Mapping[str, Any] | None = None) -> Bank:
        """Stack the jobs' parameters on the device.

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
        stacks: dict[int, Any] = {}
        for one, i in zip(self._species, self._stack_of, strict=True):
            if i not in stacks:
                columns = []
                for member in one.members:
                    name, length, _ = self._programs[member]
                    own = params.get(name, self.jobs[name].params)
                    columns.append(self._leaves(name, length, own))
                specs = one.trace.param_specs
                stacks[i] = _bank.pack(columns, specs, len(columns))
        return Bank(tuple(stacks.values()))

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
        stacks = list(bank.stacks)
        # Programs that share a stack hold the job in the same slot of it: write once.
        last = {self._stack_of[s]: at for at, (s, _) in enumerate(self._where[name])}
        for i, length in last.items():
            s, slot = self._where[name][length]
            specs = self._species[s].trace.param_specs
            capacity = len(self._species[s].members)
            new = self._leaves(name, length, new_params)
            if capacity == 1:
                stacks[i] = _bank.pack([new], specs, 1)
            else:
                leaves = _bank.unshare(stacks[i], specs, capacity, new)
                stacks[i] = _bank.write(leaves, specs, slot, new)
        return Bank(tuple(stacks))

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
        slots, buffers, places = [], [], []
        for s, members in enumerate(found):
            index, staged, placed = self._stage(s, members)
            slots.append(index)
            buffers.append(staged)
            places.extend(placed)
        return Stacked(tuple(slots), tuple(buffers), tuple(places))

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
        leaves = [
            None if species is None else [to_host(x) for x in species]
            for species in stacked.leaves
        ]
        return {
            name: cut(leaves[s] or [], slot, 0, rows, self.jobs[name], sizes)
            for name, s, slot, rows, sizes in stacked.places
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

    def _stacks(self) -> tuple[int, ...]:
        """Return which stack of the bank each species reads."""
        names, columns = [], []
        for one in self._species:
            programs = [self._programs[m] for m in one.members]
            names.append([name for name, _, _ in programs])
            columns.append([trace(p).consts for _, _, p in programs])
        return _bank.alias(names, columns)

    def _stage(
        self, s: int, members: dict[int, tuple[str, Checked]]
    ) -> tuple[Any, Any, list[Place]]:
        """Return one species' slots, buffers and places."""
        if not members:
            return None, None, []
        capacity = len(self._species[s].members)
        used = sorted(members)
        rows = next_power_of_two(max(own.rows for _, own in members.values()))
        index = None
        if len(used) < capacity:
            num_slots = min(next_power_of_two(len(used)), capacity)
            used += used[:1] * (num_slots - len(used))
            index = np.asarray(used, np.int32)
        specs = self._species[s].trace.input_specs
        buffers = tuple(
            fill([members[slot][1].leaves[i] for slot in used], rows, spec)
            for i, spec in enumerate(specs)
        ) or (np.zeros((len(used), rows), np.int8),)
        places = []
        for k, slot in enumerate(used[: len(members)]):
            name, own = members[slot]
            places.append((name, s, k, own.rows, own.out_sizes))
        return index, buffers, places

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

    def _with_lowerings(self, plan: Plan, lowering: str) -> Plan:
        """Fill in how each launch is computed at one row."""
        launches = iter(plan.launches)
        chosen = []
        for one in plan.species:
            for op in one.trace.ops:
                if op.is_heavy:
                    name = _lower.choose(
                        op,
                        [True] * len(op.inputs),
                        num_slots=len(one.members),
                        rows=1,
                        cost=plan.cost,
                        mode=lowering,
                    )
                    chosen.append(dataclasses.replace(next(launches), lowering=name))
        return dataclasses.replace(plan, launches=tuple(chosen))
