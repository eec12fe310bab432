"""Steps that read and write pinned memory answer what steps of ordinary memory do."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from stfuse._device import JaxDevice

TWO = np.float32(2)
ROWS = np.arange(-5, 5, dtype=np.float32).reshape(2, 5)


def mixed(p, x):
    """Return outputs of many kinds, some of them not computed at all."""
    zeros = jnp.zeros((x.shape[0], 3))
    return {"as is": x, "zeros": zeros, "none": x[:, :0], "scaled": x * p} | {
        name: (x * p).astype(name) for name in ("bfloat16", "int8", "bool", "complex64")
    }


def look_up(p, x):
    return p[jnp.abs(x.astype(jnp.int32))]


def mean_step(p, x):
    return p - 0.5 * x.mean(0)


def product(p, x):
    return jnp.dot(x, p, precision="highest")


def jobs():
    """Return jobs with a request each, of five species; three share one.

    Every sum is exact in float32: which rows meet in a step depends on the moment, and
    XLA adds a product up in another order where a step has more rows.
    """
    rng = np.random.default_rng(0)
    found = [
        (stfuse.Job("mixed", mixed, np.float32(3), ROWS[:1]), ROWS),
        (stfuse.Job("lookup", look_up, ROWS[0], ROWS[:1]), ROWS),
        (stfuse.Job("empty", lambda p, x: x + p, np.ones(0, "f"), ROWS[:1, :0]),
         ROWS[:, :0]),
        (stfuse.Job("step", mean_step, ROWS[0], ROWS, batched=False), ROWS),
    ]  # fmt: skip
    for i in range(3):
        params = rng.integers(-9, 9, size=(5, 4 + i // 2)).astype(np.float32) / 4
        found.append((stfuse.Job(f"product-{i}", product, params, ROWS[:1]), ROWS + i))
    return found


def answers_of(engine, asked):
    futures = [engine.submit(job.name, x) for job, x in asked]
    return [future.result(60) for future in futures]


@pytest.fixture
def serve():
    """Return a function that builds an engine on the CPU, pinned or not."""
    engines = []

    def build(is_pinned):
        device = JaxDevice(jax.devices("cpu")[0], is_pinned=is_pinned)
        engines.append(stfuse.Engine(device=device, max_batch_size=4))
        for ready in [engines[-1].add(job) for job, _ in jobs()]:
            ready.result(60)
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def test_pinned_steps_answer_the_same_bytes(serve):
    asked = [pair for pair in jobs() for _ in range(3)]
    found, expected = (answers_of(serve(is_pinned), asked) for is_pinned in (True, 0))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def test_an_answer_outlives_the_buffers_that_it_came_through(serve):
    engine = serve(True)
    job, x = jobs()[-1]
    first = engine.infer(job.name, x)
    kept = first.copy()
    for i in range(20):
        engine.infer(job.name, x + i)
    np.testing.assert_array_equal(first, kept)
    assert engine.health(timeout_s=60).is_healthy


def test_a_buffer_is_what_its_array_holds():
    device = JaxDevice(jax.devices("cpu")[0], is_pinned=True)
    buffer = device.allocate((2, 3), np.int32)
    assert not buffer.any()
    buffer[...] = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(np.asarray(buffer.array), buffer)
    assert device.allocate((2, 0), np.int32).shape == (2, 0)


def test_what_cannot_be_compiled_so_is_compiled_as_ever(serve, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such memory")

    monkeypatch.setattr(JaxDevice, "_compile_pinned", refuse)
    monkeypatch.setattr(JaxDevice, "name", "refusing:0")  # nothing is in the cache
    asked = jobs()[-3:]
    for (job, x), found in zip(asked, answers_of(serve(True), asked), strict=True):
        np.testing.assert_array_equal(found, product(job.params, x))


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2"])
def test_packed_numbers_take_ordinary_memory(dtype):
    dtype = jnp.dtype(dtype)
    x = np.ones((1, 6), dtype)
    job = stfuse.Job("packed", lambda p, x: (x.astype(jnp.float32) * p, x), TWO, x)
    device = JaxDevice(jax.devices("cpu")[0], is_pinned=True)
    with stfuse.Engine(device=device) as engine:
        engine.add(job).result(60)
        doubled, same = engine.infer("packed", x)
    np.testing.assert_array_equal(doubled, np.full((1, 6), 2.0))
    np.testing.assert_array_equal(same, x)


def test_numbers_of_64_bits_take_ordinary_memory_and_stay_such():
    device = JaxDevice(jax.devices("cpu")[0], is_pinned=True)
    assert type(device.allocate((3,), np.float64)) is np.ndarray
    with jax.enable_x64(True):
        x = {"f": np.full((1, 300), 1 / 3), "i": np.array([[2**40]])}
        job = stfuse.Job("wide", lambda p, x: (x["f"] * p, x["i"] + 1), 3.0, x)
        with stfuse.Engine(device=device) as engine:
            engine.add(job).result(60)
            ones, after = engine.infer("wide", x)
    assert ones.dtype == np.float64 and (ones == 1.0).all()
    assert after.dtype == np.int64 and after == 2**40 + 1


def test_a_job_of_64_bits_is_refused_where_they_would_be_cut_to_32():
    with jax.enable_x64(True):
        x = np.ones((1, 3), np.float64)
        job = stfuse.Job("wide", lambda p, x: x * p, np.float64(2), x)
        fused = stfuse.fuse([job])
        assert fused(fused.pack(), {"wide": x})["wide"].dtype == np.float64
    with pytest.raises(stfuse.JobError, match=r"'wide'.*float64.*jax_enable_x64"):
        stfuse.fuse([job])
    with stfuse.Engine() as engine:
        for is_wide in (True, False):
            with jax.enable_x64(is_wide), pytest.raises(stfuse.JobError, match="wide"):
                engine.add(job)


def test_a_cpu_has_no_need_of_it():
    device = JaxDevice(jax.devices("cpu")[0])
    assert device.name == "cpu:0"
    assert type(device.allocate((2,), np.float32)) is np.ndarray


def test_what_was_read_outlives_the_step_it_is_of():
    device = JaxDevice(jax.devices("cpu")[0], is_pinned=True)
    spec = jax.ShapeDtypeStruct((64, 64), np.float32)
    bank = jax.ShapeDtypeStruct((), np.float32)
    step = device.compile(lambda p, slots, xs: [xs[0] * p], bank, [], [spec])
    x = device.allocate(spec.shape, spec.dtype)
    x[...] = 1

    def run(p):
        return device.read(device.launch(step, device.put(np.float32(p)), [], [x]))[0]

    first, part = run(2), run(3)[7:9, 3:5]
    for p in range(4, 20):
        run(p)
    assert (first == 2).all() and (part == 3).all()


@pytest.mark.parametrize("is_pinned", [False, True])
def test_on_a_gpu_launches_overlap_and_beside_others_no_kernel_is_tried(
    monkeypatch, is_pinned
):
    asked, compile_lowered = [], jax.stages.Lowered.compile

    def recorded(lowered, options=None, **rest):
        asked.append(options)
        return compile_lowered(lowered, options, **rest)  # refuses what XLA has not

    monkeypatch.setattr(jax.stages.Lowered, "compile", recorded)
    monkeypatch.setattr(JaxDevice, "_is_gpu", True)
    device = JaxDevice(jax.devices("cpu")[0], is_pinned=is_pinned)
    x = device.allocate((3,), np.float32)
    x[...] = 3
    specs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((), (3,))]
    for compile_fn in (device.compile, device.compile_beside):
        step = compile_fn(lambda p, slots, xs: [xs[0] * p], specs[0], [], [specs[1]])
        outputs = device.read(device.launch(step, device.put(TWO), [], [x]))
        np.testing.assert_array_equal(outputs[0], [6, 6, 6])
    overlapping = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    quiet = {"xla_gpu_autotune_level": 0}
    quiet["xla_gpu_force_compilation_parallelism"] = max(os.cpu_count() // 4, 1)
    assert asked == [overlapping, overlapping | quiet]
