"""Keeps an engine's promises about itself: health, a builder that fails, an end.

Nothing here waits for ever, whatever the device, the clock or a callback does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import jax
from absl import logging

from stfuse._answers import settle
from stfuse._builder import Builder
from stfuse._errors import ClosedError, DeviceError
from stfuse._health import Health
from stfuse._metrics import Snapshot
from stfuse._server import DROPPED, Server

_GRACE_S = 1.0  # for threads to end once nothing is left for them to do


def check_health(server: Server, timeout_s: float) -> Health:
    """Run the canary between two steps and say how it went; never raises.

    Args:
        server: whose device.
        timeout_s: how long to wait for its answer, real seconds.
    """
    latency_s = None
    if server.is_closed:
        problem = "the engine is closed"
    else:
        asked: Future[Any] = server.command(server.faults.probe)
        try:
            problem, latency_s = asked.result(timeout_s)
        except TimeoutError:
            asked.cancel()
            problem = f"its canary was not answered within {timeout_s} s"
        except Exception as error:  # the clock's, say
            problem = f"its canary could not run, {type(error).__name__}: {error}"
    with server.lock:
        tenants = list(server.tenants.values())
        return Health(
            is_healthy=not problem,
            reason=problem,
            latency_s=latency_s,
            num_tenants=len(tenants),
            num_ready=sum(t.is_placed for t in tenants),
            queued=server.scheduler.num_queued,
            quarantined=tuple(server.faults.quarantine),
            restarts=server.faults.num_restarts,
        )


def build(server: Server, builder: Builder) -> None:
    """Run the builder until it is closed, whatever it raises: the builder thread."""
    server.faults.canary.prepare()
    while True:
        try:
            with jax.enable_x64(server.is_wide):
                return builder.run()
        except Exception as error:
            reason = f"the builder failed, {type(error).__name__}: {error}"
            logging.error("stfuse: %s", reason, exc_info=error)
            with server.lock:
                waiting = [t for t in server.tenants.values() if not t.is_placed]
            for tenant in waiting:
                if not builder.is_pending(tenant.lane):
                    name = tenant.job.name
                    text = f"job '{name}' was refused: {reason}"
                    server.members.refuse(tenant, DeviceError(text, jobs=(name,)))


def place(server: Server, builder: Builder) -> None:
    """Place newcomers beside the builder until it is closed: a thread of its own."""
    with jax.enable_x64(server.is_wide):
        builder.newcomers.run()


def end(
    server: Server,
    builder: Builder,
    threads: Sequence[threading.Thread],
    timeout_s: float | None,
) -> None:
    """End what a closed engine still has, and its threads.

    Args:
        server: takes no requests any more.
        builder: is still running, as is the server.
        threads: the builder's, newcomers', the server's, and those of callbacks.
        timeout_s: real seconds until what is left is given up; None for never.
    """
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    closed = ClosedError(DROPPED)
    build_thread, place_thread, serve_thread, *callback_threads = threads
    builder.close()
    _join(build_thread, until_s)
    _join(place_thread, until_s)
    unplaced = [n for n, t in list(server.tenants.items()) if not t.is_placed]
    server.fail_all(closed, unplaced)
    server.stop()
    _join(serve_thread, until_s)
    if serve_thread.is_alive():  # the device is too slow, or will never answer
        server.books.fail_all(closed)
        serve_thread.join(_GRACE_S)
    for tenant in list(server.tenants.values()):
        for waiting in (tenant.ready, tenant.drained, *tenant.swaps):
            if not waiting.done():
                settle(waiting, closed.about(tenant.job.name))
    server.books.callbacks.close()
    for thread in callback_threads:
        _join(thread, until_s)
    for thread in threads:
        if thread.is_alive():
            logging.error("stfuse: closed without %s, which is stuck", thread.name)


def _join(thread: threading.Thread, until_s: float | None) -> None:
    left_s = None if until_s is None else max(until_s - time.monotonic(), _GRACE_S)
    thread.join(left_s)


def snapshot(server: Server, compiles: int) -> Snapshot:
    """Return what an engine served so far, and by whom."""
    faults = server.faults
    with server.lock:
        tenants = dict(server.tenants)
        queued = {n: len(server.scheduler.queued(n)) for n in tenants}
        quarantine = {n: faults.quarantine.reason(n) for n in faults.quarantine}
    return server.metrics.snapshot(  # without the lock: it may take a while
        queued=queued,
        generations={n: t.member.generation for n, t in tenants.items()},
        lanes={n: t.lane if t.is_placed else None for n, t in tenants.items()},
        compiles=compiles,
        quarantine=quarantine,
        restarts=faults.num_restarts,
        problem=faults.state.reason,
    )
