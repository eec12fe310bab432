"""Several devices: sharded banks, and weights that live elsewhere than their engine.

JAX fixes the number of CPU devices when it starts: this runs in its own process.
"""

import os
import pathlib
import subprocess
import sys

SCRIPT = """
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import stfuse

ROWS = np.ones((2, 3), np.float32)
FIRST, SECOND, THIRD, FOURTH = jax.devices()


def apply_fn(w, x):
    return jax.nn.relu(x @ w)


def job(i, device=None):
    w = np.random.default_rng(i).normal(size=(3, 5)).astype(np.float32)
    w = w if device is None else jax.device_put(w, device)
    return stfuse.Job(f"j{i}", apply_fn, w, ROWS)


def same(found, j):
    np.testing.assert_allclose(found, apply_fn(j.params, ROWS), rtol=1e-5)


jobs = [job(i) for i in range(8)]
fused = stfuse.fuse(jobs, cost="cpu")
mesh = Mesh(np.array(jax.devices()), ("slots",))
by_slot = NamedSharding(mesh, PartitionSpec("slots"))
bank = jax.device_put(fused.pack(), by_slot)
for sub in (jobs, jobs[1:4]):
    for j, found in zip(sub, fused(bank, {j.name: ROWS for j in sub}).values()):
        same(found, j)
bank = fused.swap(bank, "j3", jobs[0].params)
assert bank.stacks[0].sharding == by_slot
same(fused(bank, {"j3": ROWS})["j3"], jobs[0])

# Compiled ahead of time, as on a GPU, a step is for one device; others get their own.
wide = stfuse.Job("wide", apply_fn, np.ones((3, 7), np.float32), ROWS)
mixed = stfuse.fuse([jobs[0], wide], cost="h200")
for device in (FIRST, SECOND):
    bank = jax.device_put(mixed.pack(), device)
    for own in (ROWS, jax.device_put(ROWS, device)):
        found = mixed(bank, {"j0": own, "wide": own})
        same(found["j0"], jobs[0])
        same(found["wide"], wide)

with stfuse.Engine(device=THIRD) as engine:
    for ready in [engine.add(job(i, SECOND)) for i in range(3)]:
        ready.result(100)
    same(engine.infer("j1", ROWS), jobs[1])
    engine.swap("j1", jax.device_put(jobs[5].params, FOURTH))
    same(engine.infer("j1", ROWS), jobs[5])
    for i in (3, 4):  # a free slot, then a larger bank
        engine.add(job(i, FIRST)).result(100)
        same(engine.infer(f"j{i}", ROWS), jobs[i])
    same(engine.infer("j1", ROWS), jobs[5])

with jax.default_device(FOURTH), stfuse.Engine() as engine:
    assert engine._server.device.name == f"cpu:{FOURTH.id}"
    engine.add(job(6)).result(100)
    same(engine.infer("j6", ROWS), job(6))
print("all equal")
"""


def test_banks_are_sharded_and_weights_come_from_anywhere():
    flags = "--xla_force_host_platform_device_count=4"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    assert "all equal" in result.stdout
