"""Traces to Plan: which ops of which jobs share a launch. Pure Python, no arrays.

Rules:
    Jobs whose traces have equal keys are one species; each op of a species is one
    launch for all its jobs. Species keep their own launches, in the same step.
    Species stand in order of their first job, so equal inputs give equal plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stfuse._program import Trace
from stfuse._types import Cost


@dataclass(frozen=True, slots=True)
class Species:
    """Jobs that are one program.

    Attributes:
        trace: the program.
        members: indices of the jobs, in order; a job's place here is its slot.
    """

    trace: Trace
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """One heavy launch of the step.

    Attributes:
        primitive: the JAX primitive.
        jobs: names of the jobs that share it.
        shape: shape of its first output for one job at one row, padded to the
            largest member.
        waste: padded work over true work, minus one.
        flops: arithmetic for all its jobs at one row.
        num_bytes: bytes read plus written for all its jobs at one row.
        lowering: how it is computed.
    """

    primitive: str
    jobs: tuple[str, ...]
    shape: tuple[int, ...]
    waste: float
    flops: float
    num_bytes: float
    lowering: str = "native"


@dataclass(frozen=True, slots=True)
class Plan:
    """Who shares which launch; print it to read it.

    Attributes:
        names: the jobs, in the order they were given.
        species: the groups of equal jobs.
        launches: heavy launches in running order.
        cost: the device record that the plan was made for.
    """

    names: tuple[str, ...]
    species: tuple[Species, ...] = field(repr=False)
    launches: tuple[Launch, ...]
    cost: Cost

    @property
    def num_launches(self) -> int:
        """Number of heavy launches of the fused step."""
        return len(self.launches)

    @property
    def num_solo(self) -> int:
        """Number of launches that serve one job of several alone."""
        if len(self.names) == 1:
            return 0
        return sum(len(launch.jobs) == 1 for launch in self.launches)

    @property
    def num_launches_alone(self) -> int:
        """Number of heavy launches if each job ran alone."""
        return sum(len(launch.jobs) for launch in self.launches)

    @property
    def waste(self) -> float:
        """Padded work over true work of the whole plan, minus one."""
        done = sum(launch.flops for launch in self.launches)
        true = sum(launch.flops / (1 + launch.waste) for launch in self.launches)
        return done / true - 1 if true else 0.0

    def __str__(self) -> str:
        """Return the plan as a table."""
        rows = [("#", "launch", "jobs", "shape", "waste", "lowering")]
        for i, launch in enumerate(self.launches):
            shape = "x".join(map(str, launch.shape)) or "scalar"
            jobs = f"{len(launch.jobs)}: {_shorten(launch.jobs)}"
            waste = f"{launch.waste:.2f}"
            rows.append((str(i), launch.primitive, jobs, shape, waste, launch.lowering))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            for row in rows
        ]
        lines.append(
            f"{len(self.names)} jobs of {len(self.species)} species: "
            f"{self.num_launches_alone} heavy launches alone, {self.num_launches} "
            f"fused, {self.num_solo} of them solo; waste {self.waste:.2f}"
        )
        return "\n".join(line.rstrip() for line in lines)


def group(traces: Sequence[Trace]) -> tuple[Species, ...]:
    """Return the species of some traces, in order of their first member."""
    members: dict[object, list[int]] = {}
    for i, trace in enumerate(traces):
        members.setdefault(trace.key, []).append(i)
    return tuple(Species(traces[m[0]], tuple(m)) for m in members.values())


def align(names: Sequence[str], traces: Sequence[Trace], cost: Cost) -> Plan:
    """Decide which ops share a launch.

    Args:
        names: the jobs' names.
        traces: their traces, in the same order.
        cost: the device to plan for.

    Returns:
        The plan; its lowerings are still to be chosen.
    """
    species = group(traces)
    launches = [
        Launch(
            primitive=op.name,
            jobs=tuple(names[i] for i in one.members),
            shape=op.specs[0].shape if op.specs else (),
            waste=0.0,
            flops=op.flops * len(one.members),
            num_bytes=op.num_bytes * len(one.members),
        )
        for one in species
        for op in one.trace.ops
        if op.is_heavy
    ]
    return Plan(tuple(names), species, tuple(launches), cost)


def _shorten(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ..."
