"""Weights for a job that is served: what is made of them first, and new ones."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from stfuse import _hoist, _lane
from stfuse._builder import Builder
from stfuse._errors import DeviceError
from stfuse._flight import Tenant
from stfuse._job import Job
from stfuse._lane import Member
from stfuse._server import Server
from stfuse._trace import check_width, trace


def own(leaves: list[Any]) -> tuple[Any, ...]:
    """Return leaves that nobody else can change: lanes are rebuilt from them."""
    return tuple(np.array(x) if isinstance(x, np.ndarray) else x for x in leaves)


def prepared(call: str, job: Job, params: Any, server: Server) -> Member:
    """Return a job as it is served, with some parameters.

    Args:
        call: of the engine, for errors.
        job: the job.
        params: pytree like the job's params.
        server: serves it.

    Raises:
        JobError: the params are unlike the job's, or the engine takes its numbers of
            64 bits for 32.
        DeviceError: what its programs do to parameters alone failed.
    """
    leaves = own(job.flatten_params(params))
    given = [trace(program) for program in job.programs]
    for program, each in zip(job.programs, given, strict=True):
        check_width(program, each, is_wide=server.is_wide)
    hoist = _hoist.hoist(given)
    try:
        traces, found = hoist.prepare(leaves, server.device.put)
    except Exception as error:  # whatever a device or a compiler raises
        raise DeviceError(
            f"`stfuse.Engine.{call}`: job '{job.name}': its parameters could not be "
            f"prepared: {type(error).__name__}: {error}.",
            jobs=(job.name,),
        ) from error
    return Member(job, traces, found)


def writing(
    server: Server, builder: Builder, tenant: Tenant, params: Any
) -> Callable[[], Future[None] | None]:
    """Bring new weights to the device, and return what writes them there, a command.

    Args:
        server: serves the job.
        builder: builds its lane anew if the weights do not fit into the one there is.
        tenant: the job.
        params: pytree like the job's params.

    Raises:
        JobError: the params are unlike the job's.
        DeviceError: they could not be prepared, or brought to the device.
    """
    new = prepared("swap", tenant.job, params, server)
    lane, staged = server.lanes.get(tenant.lane), new
    if lane is not None and tenant.job.name in lane.places:
        try:
            staged = _lane.staged(lane, new)
        except Exception as error:  # whatever a device raises
            raise _not_written(tenant, error) from error
    return partial(_write, server, builder, tenant, new, staged)


def _write(
    server: Server, builder: Builder, tenant: Tenant, new: Member, staged: Member
) -> Future[None] | None:
    """Write a job's new weights into its lane, on the device thread.

    Args:
        server: serves the job.
        builder: builds its lane anew if need be.
        tenant: the job.
        new: it with its new parameters, nobody else's.
        staged: the same, but on the device already.

    Returns:
        None if every later request sees them; else a future of when it will.

    Raises:
        DeviceError: they could not be written; the old ones stay.
    """
    old, generation = tenant.member, tenant.member.generation + 1
    tenant.member = replace(old, params=new.params, generation=generation)
    lane = server.lanes.get(tenant.lane)
    if lane is None or not tenant.is_placed:
        return None  # a lane that is being built takes the newest weights
    try:
        if _lane.write(lane, replace(tenant.member, params=staged.params)):
            server.faults.release(tenant.job.name)
            return None
    except Exception as error:
        _restore(tenant, old)
        server.members.lose_lane(lane)  # some may be written, or the old ones gone
        raise _not_written(tenant, error) from error
    waiting: Future[None] = Future()
    waiting.add_done_callback(lambda f: f.exception() and _restore(tenant, old))
    tenant.swaps.append(waiting)
    builder.request(tenant.lane)
    return waiting


def _not_written(tenant: Tenant, error: Exception) -> DeviceError:
    name = tenant.job.name
    return DeviceError(
        f"`stfuse.Engine.swap`: job '{name}': the new weights could not be written: "
        f"{type(error).__name__}: {error}. The old ones stay.",
        jobs=(name,),
    )


def _restore(tenant: Tenant, old: Member) -> None:
    """Go back to the weights that the lane still holds."""
    tenant.member = replace(old, generation=tenant.member.generation + 1)
