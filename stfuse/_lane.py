"""Lane: jobs that are served by one compiled step, their bank and their buffers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from stfuse import _bank, _cache
from stfuse._align import group
from stfuse._bank import Bank
from stfuse._job import Job
from stfuse._program import Trace
from stfuse._step import make_step
from stfuse._types import Bucket, Chunk, Cost, Device


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
        traces: one program per species.
        capacities: slots of each species.
        stack_of: which of the bank's stacks each species reads; a job's programs at
            several lengths share one.
        bank: the parameters.
        places: species and slot of each job's programs, by name.
        generations: of the weights that each job's slots hold.
        steps: compiled steps by bucket.
        buffers: free staging buffers by bucket.
    """

    name: str
    traces: tuple[Trace, ...]
    capacities: tuple[int, ...]
    stack_of: tuple[int, ...]
    bank: Bank
    places: dict[str, tuple[tuple[int, int], ...]]
    generations: dict[str, int]
    steps: dict[Bucket, Callable[..., Any]] = field(default_factory=dict)
    buffers: dict[Bucket, list[Any]] = field(default_factory=dict)

    def stacks(self) -> tuple[Any, ...]:
        """Return the parameters of each species, as a step takes them."""
        return tuple(self.bank.stacks[i] for i in self.stack_of)


def build(name: str, members: Sequence[Member], device: Device) -> Lane:
    """Group members by program and pack their weights; nothing is compiled yet."""
    programs = [(m, length) for m in members for length in range(len(m.traces))]
    species = group([m.traces[length] for m, length in programs])
    capacities = tuple(_cache.next_power_of_two(len(one.members)) for one in species)
    columns = [
        [programs[i][0].leaves(programs[i][1]) for i in one.members] for one in species
    ]
    names = [[programs[i][0].job.name for i in one.members] for one in species]
    stack_of = _bank.alias(names, columns)
    here: dict[int, Any] = {}  # by identity, which `pack` asks for

    def placed(leaf: Any) -> Any:
        """Bring an array that may live on another device to this one."""
        if isinstance(leaf, jax.Array) and id(leaf) not in here:
            here[id(leaf)] = device.put(leaf)
        return here.get(id(leaf), leaf)

    columns = [[tuple(map(placed, own)) for own in column] for column in columns]
    stacks = tuple(
        _bank.pack(columns[s], species[s].trace.param_specs, capacities[s])
        for s in dict.fromkeys(map(stack_of.index, stack_of))
    )
    places: dict[str, list[tuple[int, int]]] = {m.job.name: [] for m in members}
    where = {
        i: (s, k) for s, one in enumerate(species) for k, i in enumerate(one.members)
    }
    for i, (member, _) in enumerate(programs):
        places[member.job.name].append(where[i])
    return Lane(
        name=name,
        traces=tuple(one.trace for one in species),
        capacities=capacities,
        stack_of=stack_of,
        bank=device.put(Bank(stacks)),
        places={job: tuple(each) for job, each in places.items()},
        generations={m.job.name: m.generation for m in members},
    )


def join(lane: Lane, member: Member) -> bool:
    """Give a job a free slot, if the lane has one that needs no recompiling."""
    keys = [trace.key for trace in lane.traces]
    if any(trace.key not in keys for trace in member.traces):
        return False
    places = []
    for trace in member.traces:
        s = keys.index(trace.key)
        taken = {slot for each in lane.places.values() for of, slot in each if of == s}
        free = sorted(set(range(lane.capacities[s])) - taken)
        places.append((s, free[0] if free else -1))
    if any(slot < 0 for _, slot in places):
        return False
    lane.places[member.job.name] = tuple(places)
    if write(lane, member):
        return True
    del lane.places[member.job.name]
    return False


def leave(lane: Lane, name: str) -> None:
    """Free a job's slots."""
    lane.places.pop(name, None)
    lane.generations.pop(name, None)


def write(lane: Lane, member: Member) -> bool:
    """Put a job's weights into its slots; False if that would change the layout."""
    stacks = list(lane.bank.stacks)
    # Programs that share a stack hold the job in the same slot of it.
    places = {
        lane.stack_of[s]: (s, slot, member.leaves(length))
        for length, (s, slot) in enumerate(lane.places[member.job.name])
    }
    for i, (s, _, new) in places.items():
        specs = lane.traces[s].param_specs
        if lane.capacities[s] > 1 and not _bank.fits_shared(stacks[i], specs, new):
            return False
    for i, (s, slot, new) in places.items():
        specs = lane.traces[s].param_specs
        if lane.capacities[s] == 1:
            new = _bank.pack([new], specs, 1)
        # The new arrays go where the old ones are.
        fresh = [
            jax.device_put(x, old.sharding)
            for x, old in zip(new, stacks[i], strict=True)
        ]
        if lane.capacities[s] == 1:
            stacks[i] = tuple(fresh)
        else:
            stacks[i] = _bank.write(stacks[i], specs, slot, fresh, donate=True)
    lane.bank = Bank(tuple(stacks))
    lane.generations[member.job.name] = member.generation
    return True


def compile_bucket(
    lane: Lane, bucket: Bucket, device: Device, *, cost: Cost, lowering: str = "auto"
) -> Callable[..., Any]:
    """Return the lane's compiled step for a bucket, from the cache if it is there."""
    bank = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lane.stacks())
    slots, inputs = _specs(lane, bucket)
    form: Hashable = tuple((s.shape, s.dtype) for s in jax.tree.leaves(bank))
    signature = (
        tuple(trace.key for trace in lane.traces),
        lane.capacities,
        form,
        bucket,
        cost,
        lowering,
        device.name,
        _cache.config_key(),
    )
    step_fn = make_step(lane.traces, cost=cost, lowering=lowering)
    return _cache.STEPS.get(
        signature, lambda: device.compile(step_fn, bank, slots, inputs)
    )


def stage(
    lane: Lane,
    bucket: Bucket,
    chunks: Sequence[Chunk],
    leaves_of: Mapping[int, Sequence[Any]],
) -> tuple[Any, Any, list[tuple[int, int]]]:
    """Copy requests into the host buffers of a step.

    Args:
        lane: whose step.
        bucket: which shape.
        chunks: what runs, each in a slot.
        leaves_of: per request its input leaves ``[B, ...]``.

    Returns:
        Slots, buffers, and per chunk its species and slot of the step. All that no
        request fills is zero. Give the buffers back with `release`.
    """
    free = lane.buffers.setdefault(bucket, [])
    slots, buffers = free.pop() if free else _allocate(lane, bucket)
    filled = [0] * len(lane.traces)
    placed = []
    for chunk in chunks:
        s, own = lane.places[chunk.tenant][chunk.length]
        k = own if slots[s] is None else filled[s]
        filled[s] += 1
        placed.append((s, k))
        if slots[s] is not None:
            slots[s][k] = own
        _copy_rows([leaves_of[r] for r in chunk.requests], buffers[s], k)
    for s, staged in enumerate(buffers):
        if staged is not None:
            _clear(staged, slots[s], filled[s], {k for of, k in placed if of == s})
    return slots, buffers, placed


def release(lane: Lane, bucket: Bucket, slots: Any, buffers: Any) -> None:
    """Give staging buffers back once their step was read."""
    lane.buffers[bucket].append((slots, buffers))


def sample(lane: Lane, bucket: Bucket) -> tuple[Any, Any]:
    """Return slots and inputs to time a step with: zeros can run faster than data."""
    slots, buffers = _allocate(lane, bucket)
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(buffers):
        if np.issubdtype(leaf.dtype, np.floating):
            leaf[...] = rng.standard_normal(leaf.shape)
    return slots, buffers


def _specs(lane: Lane, bucket: Bucket) -> tuple[Any, Any]:
    """Return the specs of a bucket's slots and inputs."""
    slots, inputs = [], []
    for trace, k, capacity in zip(
        lane.traces, bucket.slots, lane.capacities, strict=True
    ):
        is_indexed = 0 < k < capacity
        slots.append(jax.ShapeDtypeStruct((k,), np.int32) if is_indexed else None)
        lead = (k, bucket.rows)
        leaves = tuple(
            jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype) for s in trace.input_specs
        ) or (jax.ShapeDtypeStruct(lead, np.int8),)  # no inputs: a bare carrier
        inputs.append(leaves if k else None)
    return slots, inputs


def _allocate(lane: Lane, bucket: Bucket) -> tuple[Any, Any]:
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), _specs(lane, bucket))


def _copy_rows(
    requests: Sequence[Sequence[Any]], buffers: Sequence[Any], k: int
) -> None:
    """Copy requests into one slot, one after the other; zero the rows left."""
    for i, buffer in enumerate(buffers):
        at = 0
        for leaves in requests:
            if i < len(leaves):  # a bare carrier has no rows to copy
                buffer[k, at : at + len(leaves[i])] = leaves[i]
                at += len(leaves[i])
        buffer[k, at:] = 0


def _clear(staged: Sequence[Any], slots: Any, filled: int, used: set[int]) -> None:
    """Zero the slots that nobody uses, so that no old row is ever computed on."""
    unused = [k for k in range(staged[0].shape[0]) if k not in used]
    if unused:
        for buffer in staged:
            buffer[unused] = 0
    if slots is not None:
        slots[filled:] = 0
