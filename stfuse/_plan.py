"""Plan: who shares which launch, as plain records; print it to read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stfuse._program import Literal, Op, Trace
from stfuse._trace import scan_parts, trace_body
from stfuse._types import Cost

Programs = Mapping[int, Trace]  # species to its program, or to a loop's body


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
class Node:
    """One launch, heavy or light.

    Attributes:
        members: per species that shares it, the index of its op, species ascending.
        body: of a scan that several species share, the launches of its body.
    """

    members: tuple[tuple[int, int], ...]
    body: tuple[Node, ...] | None = None

    @property
    def species(self) -> tuple[int, ...]:
        """The species that share it."""
        return tuple(s for s, _ in self.members)


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
        why_solo: why it serves one job of several alone; empty if it does not.
    """

    primitive: str
    jobs: tuple[str, ...]
    shape: tuple[int, ...]
    waste: float
    flops: float
    num_bytes: float
    lowering: str = "native"
    why_solo: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Who shares which launch; print it to read it.

    Attributes:
        names: the jobs, in the order they were given.
        species: the groups of equal jobs.
        launches: heavy launches in running order.
        cost: the device record that the plan was made for.
        nodes: all launches, light ones too, in running order.
        apart: light ops that species run by themselves although others have such ops:
            ``(primitive, why, how many)``.
        param_bytes_alone: bytes of all jobs' parameters.
        param_bytes: bytes of the bank, padding and sharing included.
    """

    names: tuple[str, ...]
    species: tuple[Species, ...] = field(repr=False)
    launches: tuple[Launch, ...]
    cost: Cost
    nodes: tuple[Node, ...] = field(repr=False, default=())
    apart: tuple[tuple[str, str, int], ...] = ()
    param_bytes_alone: int = 0
    param_bytes: int = 0

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

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain numbers, texts and lists, for tools.

        Returns:
            What the table shows, ready for ``json.dumps``.
        """
        return {
            "jobs": list(self.names),
            "species": [[self.names[i] for i in s.members] for s in self.species],
            "launches": [
                {**asdict(x), "jobs": list(x.jobs), "shape": list(x.shape)}
                for x in self.launches
            ],
            "apart": [list(x) for x in self.apart],
            "cost": asdict(self.cost),
            **{
                name: getattr(self, name)
                for name in (
                    "num_launches_alone",
                    "num_launches",
                    "num_solo",
                    "waste",
                    "param_bytes_alone",
                    "param_bytes",
                )
            },
        }

    def __str__(self) -> str:
        """Return the plan as a table."""
        rows = [("#", "launch", "jobs", "shape", "waste", "lowering", "why solo")]
        for i, launch in enumerate(self.launches):
            shape = "x".join(map(str, launch.shape)) or "scalar"
            jobs = f"{len(launch.jobs)}: {_shorten(launch.jobs)}"
            own = (launch.primitive, jobs, shape, f"{launch.waste:.2f}")
            rows.append((str(i), *own, launch.lowering, launch.why_solo))
        lines = _table(rows)
        for primitive, why, count in self.apart:
            lines.append(f"light ops apart: {count} {primitive} ({why})")
        lines.append(
            f"{len(self.names)} jobs of {len(self.species)} species: "
            f"{self.num_launches_alone} heavy launches alone, {self.num_launches} "
            f"fused, {self.num_solo} of them solo; waste {self.waste:.2f}"
        )
        if self.param_bytes:
            alone, held = self.param_bytes_alone / 1e6, self.param_bytes / 1e6
            lines.append(f"parameters: {alone:.3f} MB alone, {held:.3f} MB fused")
        return "\n".join(line.rstrip() for line in lines)


def group(traces: Sequence[Trace]) -> tuple[Species, ...]:
    """Return the species of some traces, in order of their first member."""
    members: dict[object, list[int]] = {}
    for i, trace in enumerate(traces):
        members.setdefault(trace.key, []).append(i)
    return tuple(Species(traces[m[0]], tuple(m)) for m in members.values())


def components(
    num_species: int, sets: Iterable[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Return the sets of species that share something with one another, ascending.

    Args:
        num_species: how many there are.
        sets: who shares one thing, a launch say; none is empty.
    """
    root = list(range(num_species))

    def find(s: int) -> int:
        while root[s] != s:
            s = root[s]
        return s

    for first, *rest in sets:
        for s in rest:
            low, high = sorted((find(first), find(s)))
            root[high] = low
    found: dict[int, list[int]] = {}
    for s in range(num_species):
        found.setdefault(find(s), []).append(s)
    return tuple(map(tuple, found.values()))


def used_together(
    programs: Programs,
    nodes: Sequence[Node],
    wanted: Mapping[int, Sequence[int]],
) -> list[tuple[tuple[int, int], ...]]:
    """Group values of several species by the launch that reads them first.

    Values of a group belong in one stack: their first reader finds them lined up.

    Args:
        programs: per species its program.
        nodes: its launches.
        wanted: per species the numbers of the values to group.

    Returns:
        Groups of ``(species, value)``, each species at most once in each; species
        ascending; values that nothing reads are alone.
    """
    left = {(s, v) for s, numbers in wanted.items() for v in numbers}
    order = {(s, v): i for s, ns in wanted.items() for i, v in enumerate(ns)}
    groups: list[tuple[tuple[int, int], ...]] = []
    for node in nodes:
        if not left:
            break
        own = [(s, programs[s].ops[i]) for s, i in node.members if s in wanted]
        for together in _read_first(node, own, left):
            groups.append(together)
            left -= set(together)
    groups += [(value,) for value in sorted(left)]
    return sorted(groups, key=lambda g: min((order[v], v[0]) for v in g))


def _read_first(
    node: Node, own: list[tuple[int, Op]], left: set[tuple[int, int]]
) -> list[tuple[tuple[int, int], ...]]:
    """Return the groups that one launch reads, among the values left."""
    if node.body is not None and len(own) > 1:
        return _read_in_body(node.body, own, left)
    found, taken = [], set()
    for p in range(max((len(op.inputs) for _, op in own), default=0)):
        here = [
            (s, atom)
            for s, op in own
            if not isinstance(atom := op.inputs[p], Literal)
            and (s, atom) in left
            and (s, atom) not in taken
        ]
        taken |= set(here)
        if here:
            found.append(tuple(here))
    return found


def _read_in_body(
    body: Sequence[Node], own: list[tuple[int, Op]], left: set[tuple[int, int]]
) -> list[tuple[tuple[int, int], ...]]:
    """Return the groups that a shared loop reads, as its body does."""
    inside = {s: trace_body(op) for s, op in own}
    kinds: list[dict[tuple[int, int], tuple[int, int]]] = [{}, {}, {}]
    for s, op in own:
        num_consts, num_carries, _ = scan_parts(op)
        for q, atom in enumerate(op.inputs):
            if not isinstance(atom, Literal) and (s, atom) in left:
                kind = kinds[(q >= num_consts) + (q >= num_consts + num_carries)]
                kind[(s, inside[s].num_params + q)] = (s, atom)
    found, taken = [], set()
    for outer in kinds:  # constants have no time axis, and carries another layout
        wanted: dict[int, list[int]] = {}
        for s, v in outer:
            wanted.setdefault(s, []).append(v)
        for together in used_together(inside, body, wanted):
            values = [outer[v] for v in together if outer[v] not in taken]
            taken |= set(values)
            if values:
                found.append(tuple(values))
    return found


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines of equal columns; a column without content is left out."""
    columns = [c for c in zip(*rows, strict=True) if any(c[1:]) or len(rows) == 1]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]


def _shorten(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ..."


def count_apart(
    reasons: Iterable[tuple[str, str]],
) -> tuple[tuple[str, str, int], ...]:
    """Return how often each ``(primitive, why)`` occurs, most frequent first."""
    counts = Counter(reasons)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple((primitive, why, n) for (primitive, why), n in ranked)
