"""Lane: jobs that are served by one compiled step, and their bank."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from absl import logging

from stfuse import _bank, _cache, _regions
from stfuse._align import align
from stfuse._bank import Bank
from stfuse._job import Job
from stfuse._layout import Layout, lay_out
from stfuse._plan import Plan, Species, group
from stfuse._program import Trace
from stfuse._stacked import LeafPlaces
from stfuse._step import make_step
from stfuse._types import Bucket, Cost, Device


@dataclass(frozen=True, slots=True)
class Member:
    """A job and the weights it has now.

    Attributes:
        job: the job.
        traces: its program at each of its lengths.
        params: its parameters in trace order.
        generation: counts swaps.
    """

    job: Job
    traces: tuple[Trace, ...]
    params: tuple[Any, ...] = field(repr=False)
    generation: int = 0

    def leaves(self, length: int) -> tuple[Any, ...]:
        """Return the parameters of one program, closed-over arrays last."""
        return (*self.params, *self.traces[length].consts)


@dataclass(slots=True)
class Lane:
    """One group of jobs. After `build` only the device thread changes it.

    Attributes:
        name: its name.
        plan: who shares which launch.
        layout: where leaves stand.
        capacities: slots of each species.
        bank: the parameters.
        places: species and slot of each job's programs, by name.
        generations: of the weights that each job's slots hold.
        allocate: makes host buffers of zeros, of a shape and dtype.
        known: of the weights of jobs that have or may have slots.
        steps: compiled steps by bucket.
        step_s: what each took when it was first measured, seconds.
        step_bytes: what each needs of the device beside the bank.
        buffers: free staging buffers by bucket.
        entries: where inputs are staged, by bucket.
        cuts: where outputs stand, by bucket and species.
    """

    name: str
    plan: Plan
    layout: Layout
    capacities: tuple[int, ...]
    bank: Bank
    places: dict[str, tuple[tuple[int, int], ...]]
    generations: dict[str, int]
    allocate: Callable[..., np.ndarray] = np.zeros
    known: dict[str, int] = field(default_factory=dict)
    steps: dict[Bucket, Callable[..., Any]] = field(default_factory=dict)
    step_s: dict[Bucket, float] = field(default_factory=dict)
    step_bytes: dict[Bucket, int] = field(default_factory=dict)
    buffers: dict[Bucket, list[Any]] = field(default_factory=dict)
    entries: dict[Bucket, Any] = field(default_factory=dict)
    cuts: dict[tuple[Bucket, int], LeafPlaces] = field(default_factory=dict)

    @property
    def traces(self) -> tuple[Trace, ...]:
        """One program per species."""
        return tuple(one.trace for one in self.plan.species)


def build(
    name: str,
    members: Sequence[Member],
    device: Device,
    *,
    cost: Cost,
    max_capacity: int | None = None,
    admit: Callable[[int], None] = lambda num_bytes: None,
) -> Lane:
    """Plan who shares launches and pack the weights; nothing is compiled yet.

    Args:
        name: the lane's.
        members: its jobs; where slots are few, the first of them get one.
        device: where the weights go.
        cost: what the planner knows of it.
        max_capacity: most slots of a species; None for one for each job.
        admit: called with the bank's bytes before it is packed; raises if it is not to.
    """
    programs = [(m, length) for m in members for length in range(len(m.traces))]
    traces = [m.traces[length] for m, length in programs]
    species = group(traces)
    most = max_capacity or len(members)
    capacities = tuple(
        _cache.next_power_of_two(min(len(one.members), most)) for one in species
    )
    columns = [
        [programs[i][0].leaves(programs[i][1]) for i in one.members] for one in species
    ]
    names = [[programs[i][0].job.name for i in one.members] for one in species]
    bank_of = _bank.alias(names, columns)
    shares = _bank.marks(columns, capacities, bank_of)
    plan = align(
        [m.job.name for m, _ in programs],
        traces,
        cost,
        shares=shares,
        banks=bank_of,
        counts=capacities,
        is_concurrent=cost.source != "cpu",
    )
    first = [bank_of.index(b) for b in range(max(bank_of) + 1)]
    layout = lay_out(plan, bank_of, [capacities[s] for s in first], shares)
    own = [columns[s] for s in first]
    admit(_bank.num_bytes(layout, own)[1])
    places = _places(programs, species, capacities)
    held = {m.job.name: m.generation for m in members if m.job.name in places}
    return Lane(
        name=name,
        plan=plan,
        layout=layout,
        capacities=capacities,
        bank=device.put(_bank.pack(layout, _brought(own, layout.capacities, device))),
        places=places,
        generations=held,
        allocate=getattr(device, "allocate", np.zeros),
        known=dict(held),
    )


def sibling(lane: Lane, name: str) -> Lane:
    """Return a lane like another one, with its steps, and nobody in it.

    Leaves that all of its jobs share are the same arrays. A step that was not measured
    yet, which another thread may be about to, is left out.
    """
    bank, step_s = _bank.emptied(lane.layout, lane.bank), dict(lane.step_s)
    return replace(
        lane,
        name=name,
        bank=bank,
        places={},
        generations={},
        known={},
        steps={b: step for b, step in dict(lane.steps).items() if b in step_s},
        step_s=step_s,
        step_bytes=dict(lane.step_bytes),
        buffers={},
    )


def _places(
    programs: Sequence[tuple[Member, int]],
    species: Sequence[Species],
    capacities: Sequence[int],
) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return species and slot of each job's programs, for jobs that get their slots."""
    where = {
        i: (s, k)
        for s, one in enumerate(species)
        for k, i in enumerate(one.members)
        if k < capacities[s]
    }
    found: dict[str, list[tuple[int, int]]] = {m.job.name: [] for m, _ in programs}
    for i, (member, _) in enumerate(programs):
        found[member.job.name] += [where[i]] if i in where else []
    lengths = {m.job.name: len(m.traces) for m, _ in programs}
    return {job: tuple(x) for job, x in found.items() if len(x) == lengths[job]}


def _brought(
    columns: Sequence[Sequence[_bank.Leaves]],
    capacities: Sequence[int],
    device: Device,
) -> list[Any]:
    """Bring arrays that may live elsewhere to this device, for jobs that get a slot.

    One job's after another's: a step's inputs wait behind all that is on its way.
    """
    here: dict[int, Any] = {}  # by identity, which `pack` asks for

    def placed(leaves: _bank.Leaves) -> _bank.Leaves:
        new = [x for x in leaves if isinstance(x, jax.Array) and id(x) not in here]
        brought = jax.block_until_ready(device.put(new))
        here.update(zip(map(id, new), brought, strict=True))
        return tuple(here.get(id(x), x) for x in leaves)

    return [
        [placed(x) if k < capacity else x for k, x in enumerate(column)]
        for column, capacity in zip(columns, capacities, strict=True)
    ]


def knows(lane: Lane, member: Member) -> bool:
    """Return whether a job could have a slot of a lane, free or not, as it is."""
    name, keys = member.job.name, {trace.key for trace in lane.traces}
    if any(trace.key not in keys for trace in member.traces):
        return False
    if lane.known.get(name) != member.generation:  # comparing takes a while
        banks = [lane.layout.bank_of[s] for s in species_of(lane, member)]
        for b, length in {b: length for length, b in enumerate(banks)}.items():
            if not _bank.fits_shared(lane.layout, lane.bank, b, member.leaves(length)):
                return False
        lane.known[name] = member.generation
    return True


def species_of(lane: Lane, member: Member) -> tuple[int, ...]:
    """Return the species of a job's programs in a lane that knows it."""
    keys = [trace.key for trace in lane.traces]
    return tuple(keys.index(trace.key) for trace in member.traces)


def join(lane: Lane, member: Member) -> bool:
    """Give a job a free slot, if the lane has one that needs no recompiling."""
    if not knows(lane, member):
        return False
    found = [(s, free_slot(lane, s)) for s in species_of(lane, member)]
    places = tuple((s, slot) for s, slot in found if slot is not None)
    if len(places) < len(found):
        return False
    lane.places[member.job.name] = places
    _put(lane, member)
    return True


def has_room(lane: Lane, member: Member) -> bool:
    """Return whether a lane has a free slot for a job's programs; any thread."""
    keys = {trace.key for trace in lane.traces}
    return all(trace.key in keys for trace in member.traces) and all(
        free_slot(lane, s) is not None for s in species_of(lane, member)
    )


def free_slot(lane: Lane, species: int) -> int | None:
    """Return the first slot of a species' bank that no job has.

    Programs of one job at several lengths share a bank, and so do their slots.
    """
    bank_of = lane.layout.bank_of
    taken = {
        k
        for each in [*lane.places.values()]
        for s, k in each
        if bank_of[s] == bank_of[species]
    }
    return min(set(range(lane.capacities[species])) - taken, default=None)


def leave(lane: Lane, name: str, *, is_coming_back: bool = False) -> None:
    """Free a job's slots."""
    if not is_coming_back:
        lane.known.pop(name, None)
    lane.places.pop(name, None)
    lane.generations.pop(name, None)


def is_intact(lane: Lane) -> bool:
    """Return whether a lane has its weights: a write that fails may have eaten them."""
    return not any(stack.is_deleted() for stack in lane.bank.stacks)


def write(lane: Lane, member: Member) -> bool:
    """Put a job's weights into its slots, if any; False if they change the layout."""
    if not knows(lane, member):
        return False
    if member.job.name in lane.places:
        _put(lane, member)
    return True


def staged(lane: Lane, member: Member) -> Member:
    """Return a job whose weights are where a lane's are, as far as it has its own.

    Any thread may do that, while others are served; what is written then is a copy
    within the device.
    """
    banks = {lane.layout.bank_of[s] for s in species_of(lane, member)}
    own = {i for b in banks for i in _bank.written_leaves(lane.layout, lane.bank, b)}
    own &= set(range(len(member.params)))  # and no closed-over array
    params = _brought_there(lane, member.params, own)
    return replace(member, params=tuple(jax.block_until_ready(params)))


def _brought_there(lane: Lane, leaves: Sequence[Any], which: set[int]) -> list[Any]:
    """Return leaves, some of them where the lane's are."""
    if not lane.bank.stacks:
        return list(leaves)
    where, found = lane.bank.stacks[0].sharding, list(leaves)
    far = [i for i in sorted(which) if getattr(leaves[i], "sharding", None) != where]
    moved = jax.device_put([leaves[i] for i in far], where)
    for i, x in zip(far, moved, strict=True):
        found[i] = x
    return found


def _put(lane: Lane, member: Member) -> None:
    # Programs that share a bank hold the job in the same slot of it.
    places = {
        lane.layout.bank_of[s]: (slot, member.leaves(length))
        for length, (s, slot) in enumerate(lane.places[member.job.name])
    }
    for b, (slot, new) in places.items():
        # The new arrays go where the old ones are; what is kept once is there.
        own = _bank.written_leaves(lane.layout, lane.bank, b)
        fresh = _brought_there(lane, new, own)
        lane.bank = _bank.write(lane.layout, lane.bank, b, slot, fresh, donate=True)
    lane.generations[member.job.name] = member.generation


def compile_bucket(
    lane: Lane,
    bucket: Bucket,
    device: Device,
    *,
    cost: Cost,
    lowering: str = "known",
    is_beside: bool = False,
) -> Callable[..., Any]:
    """Return the lane's compiled step for a bucket, from the cache if it is there.

    Args:
        lane: whose.
        bucket: which shape.
        device: where it is to run.
        cost: what the planner knows of the device.
        lowering: as of `make_step`.
        is_beside: whether the device serves others, whom compiling must not stall.
    """
    compile_fn = device.compile
    if is_beside:
        compile_fn = getattr(device, "compile_beside", compile_fn)
    stacks = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in lane.bank.stacks)
    slots, inputs = specs(lane, bucket)
    signature: Hashable = (
        tuple(trace.key for trace in lane.traces),
        lane.plan.nodes,
        lane.layout,
        tuple((s.shape, s.dtype) for s in stacks),
        bucket,
        cost,
        lowering,
        device.name,
        _cache.config_key(),
    )

    def build(mode: str) -> Callable[..., Any]:
        step_fn = make_step(lane.plan, lane.layout, cost=cost, lowering=mode)
        return compile_fn(step_fn, stacks, slots, inputs)

    def build_any() -> Callable[..., Any]:
        try:
            return build(lowering)
        except Exception as error:
            if not _regions.are_used(cost, lowering):
                raise
            # A kernel that a compiler refuses must not cost a job its place.
            logging.warning("stfuse: a step is compiled without regions: %s", error)
            return build("plain")

    return _cache.STEPS.get(signature, build_any)


def specs(lane: Lane, bucket: Bucket) -> tuple[Any, Any]:
    """Return the specs of a bucket's slots and inputs."""
    counts, slots, inputs = bucket.counts, [], []
    for k, capacity in zip(bucket.slots, lane.capacities, strict=True):
        is_indexed = 0 < k and (k < capacity or bucket.is_open)
        index = jax.ShapeDtypeStruct((k,), np.int32) if is_indexed else None
        slots.append(index if k else ())
    for buffer in lane.layout.inputs:
        rows = buffer.num_rows(counts)
        shape = (rows, bucket.rows, *buffer.shape(counts)) if rows else ()
        inputs.append(jax.ShapeDtypeStruct(shape, buffer.dtype) if rows else None)
    return slots, inputs
