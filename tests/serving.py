"""What tests of the engine share: a ready engine, a held device, a patient wait."""

import time

import numpy as np

import stfuse

ROW = np.ones((1, 3), np.float32)
POLICIES = ("exclusive", "time", "space-time")


def serve(*jobs, **options):
    """Return an engine that serves some jobs at full speed."""
    engine = stfuse.Engine(**{"max_batch_size": 4, **options})
    for ready in [engine.add(job) for job in jobs]:
        ready.result(60)
    return engine


def wait_for(condition):
    """Wait until something that another thread does has happened."""
    until_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until_s, "waited for too long"
        time.sleep(0.001)


def busy_with(engine, device, name):
    """Hold the device with a step in flight; return that step's future."""
    before = device.num_reads
    device.hold()
    future = engine.submit(name, ROW)
    # Launched is not enough: until it is waited for, another one could follow it.
    wait_for(lambda: device.num_reads > before)
    return future


def assert_idle(engine):
    """Check that nothing is queued, in flight, to be retried, or still on the books."""
    server = engine._server
    with server.lock:
        assert not server.scheduler.num_queued
        assert not server.books._requests
        assert not server._in_flight and not server.faults.retries
        assert not any(t.outstanding for t in server.tenants.values())
    assert engine.stats().queued == 0
