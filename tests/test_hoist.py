"""What is made of a parameter alone is made once, and nobody sees a difference."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

import stfuse
from stfuse import _hoist
from stfuse._trace import Literal, trace
from tests import cases, programs

BF16, F32 = jnp.bfloat16, np.float32
EXAMPLES = settings.default.max_examples


def half(w):
    return w.astype(BF16)


def spec(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def looped(p, x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ half(p)), None), x, None, length=2)[0]


W, B = spec(3, 3), spec(3)
# Name: the function, its parameters, and of each leaf what is made of it beforehand.
TABLE = {
    "cast": (lambda p, x: x @ half(p), W, ["convert_element_type"]),
    "cast twice": (
        lambda p, x: x @ half(p) + half(p)[0],
        W,
        ["convert_element_type"],
    ),
    "cast, and used as it is": (lambda p, x: x @ half(p) + p[0].astype(BF16), W, [""]),
    "cast in two ways": (
        lambda p, x: x @ half(p) + p.astype(np.float16).sum(),
        W,
        [""],
    ),
    "widened": (lambda p, x: x @ p.astype(F32), spec(3, 3, dtype=BF16), [""]),
    "widened in between": (
        lambda p, x: x @ half(jnp.sin(p.astype(F32))),
        spec(3, 3, dtype=BF16),
        ["convert_element_type sin convert_element_type"],
    ),
    "base and adapter": (
        lambda p, x: x @ (p[0] + p[1] @ p[2]),
        [W, spec(3, 1), spec(1, 3)],
        ["", "", ""],
    ),
    "cast base and adapter": (
        lambda p, x: x @ (half(p[0]) + half(p[1]) @ half(p[2])),
        [W, spec(3, 1), spec(1, 3)],
        ["convert_element_type"] * 3,
    ),
    "bias": (lambda p, x: x + p, B, [""]),
    "cast bias": (lambda p, x: x + half(p), B, ["convert_element_type"]),
    "bias, broadcast and cast": (
        lambda p, x: x + half(p[None]),
        B,
        ["broadcast_in_dim convert_element_type"],
    ),
    "cast and repeated": (
        lambda p, x: x @ jnp.broadcast_to(half(p), (3, 3)),
        B,
        ["convert_element_type"],
    ),
    "repeated and cast": (lambda p, x: x @ half(jnp.broadcast_to(p, (3, 3))), B, [""]),
    "transposed": (lambda p, x: x @ p.T, W, ["transpose"]),
    "transposed and cast": (
        lambda p, x: x @ half(p.T),
        W,
        ["transpose convert_element_type"],
    ),
    "scaled": (lambda p, x: x @ (0.5 * jnp.exp(-p) + 1), W, ["neg exp mul add"]),
    "scaled in two ways": (lambda p, x: x @ (p * 2) + (p * 3)[0], W, [""]),
    "squared": (lambda p, x: x @ (p * p), W, ["mul"]),
    "a part of it": (lambda p, x: x + half(p)[1], W, ["convert_element_type"]),
    "two of them": (lambda p, x: x @ (p[0] * p[1]), [W, W], ["", ""]),
    "never read": (lambda p, x: x + p[1], [W, B], ["", ""]),
    "in a loop": (looped, W, [""]),
    "bits cut": (
        lambda p, x: x @ lax.reduce_precision(p, 8, 7),
        W,
        ["reduce_precision"],
    ),
    "whole numbers": (
        lambda p, x: half(x * (p + 1).astype(np.int8)[0]),
        spec(3, dtype=np.int32),
        ["add convert_element_type"],
    ),
    "an index": (lambda p, x: x[..., p], spec(2, dtype=np.int32), [""]),
    "quantized": (lambda p, x: x @ half(p), spec(3, 3, dtype=np.int8), [""]),
    "four bits": (
        lambda p, x: x @ p.astype(np.int8).astype(F32),
        spec(3, 3, dtype=jnp.int4),
        [""],
    ),
    "a number": (lambda p, x: x * p, 0.5, ["convert_element_type"]),
}


def job_of(name, dtype=BF16):
    apply_fn, params, _ = TABLE[name]
    return stfuse.Job("job", apply_fn, params, spec(2, 3, dtype=dtype))


def hoisted(*jobs):
    return _hoist.hoist([trace(p) for job in jobs for p in job.programs])


def prepare(found, leaves):
    return found.prepare(leaves, jax.device_put)


def ops_of(chains, num_leaves):
    return [
        " ".join(op.name for op in chains[i].ops) if i in chains else ""
        for i in range(num_leaves)
    ]


def evaluate(traced, leaves, inputs):
    values = dict(enumerate([*leaves, *traced.consts, *inputs]))
    assert [(v.shape, v.dtype) for v in map(jnp.asarray, values.values())] == [
        (s.shape, s.dtype) for s in traced.specs
    ]

    def read(atom):
        is_written = isinstance(atom, Literal)
        return jnp.asarray(atom.value, atom.spec.dtype) if is_written else values[atom]

    for op in traced.ops:
        values.update(zip(op.outputs, op.bind_fn(*map(read, op.inputs)), strict=True))
    return list(map(read, traced.outputs))


@pytest.mark.parametrize("name", TABLE)
def test_what_is_hoisted_of_each_leaf(name):
    params, expected = TABLE[name][1:]
    job = job_of(name)
    found = hoisted(job)
    assert ops_of(found.chains[0], len(jax.tree.leaves(params))) == expected
    if not any(expected):
        assert found.traces[0] is trace(job)


@pytest.mark.parametrize("name", TABLE)
def test_a_hoisted_program_gives_what_the_program_gives(name):
    job, rng = job_of(name), np.random.default_rng(0)
    leaves = [
        x if isinstance(x, float) else rng.integers(0, 3, x.shape).astype(x.dtype)
        for x in jax.tree.leaves(job.params)
    ]
    found = hoisted(job)
    (traced,), own = prepare(found, leaves)
    x = jnp.asarray(rng.normal(size=3), BF16)
    known = len(traced.specs)
    for op in traced.ops:
        assert op.outputs == tuple(range(known, known + len(op.outputs)))
        known += len(op.outputs)
    case = cases.Case(name, lambda seed: (), lambda rng, rows: None, 16, BF16)
    for actual, expected in zip(
        evaluate(traced, own, [x]), evaluate(trace(job), leaves, [x]), strict=True
    ):
        cases.assert_same(np.asarray(actual), np.asarray(expected), case)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_every_kind_of_job_gives_the_same_hoisted(case):
    job, x = cases.job(case, 0), case.inputs(3, 1)
    (traced,), own = prepare(hoisted(job), jax.tree.leaves(job.params))
    row = jax.tree.leaves(jax.tree.map(lambda v: v[0], x) if case.batched else x)
    outs = jax.jit(functools.partial(evaluate, traced))(own, row)
    answer = jax.tree.unflatten(jax.tree.structure(job.outputs), outs)
    if case.batched:
        answer = jax.tree.map(lambda y: y[None], answer)
    cases.assert_same(answer, cases.alone(job, x), case)


def test_what_a_program_returns_as_it_is_stays():
    def run(p, x):
        return x @ half(p[0]), p[0], x @ half(p[1]), half(p[1])

    job = stfuse.Job("job", run, [W, W], spec(2, 3), batched=False)
    found = hoisted(job)
    assert ops_of(found.chains[0], 2) == ["", "convert_element_type"]
    assert found.traces[0].outputs[1] == 0 and found.traces[0].outputs[3] == 1


def test_a_key_is_left_alone():
    def run(p, x):
        return x + jax.random.normal(p.reshape(1)[0], x.shape)

    job = stfuse.Job("job", run, jax.random.key(0), spec(1, 3))
    assert not hoisted(job).chains[0]


def test_a_cast_is_bitwise_a_cast_and_all_stay_where_their_leaves_are():
    w = np.random.default_rng(0).normal(size=(3, 3)).astype(F32)
    device = jax.devices()[0]
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    for leaf in (w, jnp.asarray(w), jax.device_put(w, pinned)):
        _, (own,) = prepare(hoisted(job_of("cast")), [leaf])
        assert own.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.asarray(own), w.astype(ml_dtypes.bfloat16))
        _, (own,) = prepare(hoisted(job_of("scaled")), [leaf])
        np.testing.assert_allclose(np.asarray(own), 0.5 * np.exp(-w) + 1, 1e-6)
        assert type(own) is type(leaf)
        if isinstance(leaf, jax.Array):
            assert own.sharding == leaf.sharding


def test_only_what_devices_may_disagree_on_goes_to_the_device():
    w, put = np.ones((3, 3), F32), []

    def watched(x):
        put.append(x)
        return jax.device_put(x)

    for leaf in (w, jnp.asarray(w)):
        hoisted(job_of("transposed and cast")).prepare([leaf], watched)
        assert not put
        hoisted(job_of("scaled")).prepare([leaf], watched)
        assert len(put) == 1
        put.clear()


def test_one_array_stays_one_array_for_as_long_as_somebody_has_it():
    found, other = hoisted(job_of("cast")), hoisted(job_of("transposed"))
    w = jnp.ones((3, 3))
    _, (own,) = prepare(found, [w])
    assert prepare(found, [w])[1][0] is own
    assert prepare(found, [jnp.ones((3, 3))])[1][0] is not own
    assert prepare(other, [w])[1][0] is not own
    known = [key for key in _hoist._REMEMBERED if key[1] == id(w)]
    assert len(known) == 1, "the other one is nobody's any more"
    place = known[0]
    del own
    assert place not in _hoist._REMEMBERED
    _, (own,) = prepare(found, [w])
    assert place in _hoist._REMEMBERED
    del w
    assert place not in _hoist._REMEMBERED, "its number may be another's soon"


def test_leaves_that_are_one_array_are_one_still():
    job = job_of("cast base and adapter")
    square = stfuse.Job("job", job.apply_fn, [W, W, W], job.example)
    w = np.ones((3, 3), F32)
    _, own = prepare(hoisted(square), [w, np.ones((3, 3), F32), w])
    assert own[0] is own[2] and own[0] is not own[1]


def test_jobs_of_one_program_are_one_program_still():
    def make():
        return stfuse.Job("job", lambda p, x: x @ half(p), W, spec(1, 3, dtype=BF16))

    narrow = stfuse.Job(
        "job", lambda p, x: x @ p, spec(3, 3, dtype=BF16), spec(1, 3, dtype=BF16)
    )
    keys = {hoisted(job).traces[0].key for job in (make(), make(), narrow)}
    assert len(keys) == 1
    assert hoisted(make()).traces[0].key != trace(make()).key
    job = make()
    assert hoisted(job).traces[0] is hoisted(job).traces[0], "found once"


def test_closed_over_arrays_are_prepared_too():
    base = jnp.arange(9.0).reshape(3, 3)

    def run(p, x):
        return x @ half(base) + half(p)

    jobs = [stfuse.Job(n, run, B, spec(1, 3, dtype=BF16)) for n in "ab"]
    prepared = [prepare(hoisted(job), [np.ones(3, F32)]) for job in jobs]
    consts = [traced.consts[0] for (traced,), _ in prepared]
    assert consts[0].dtype == BF16 and consts[0] is consts[1]
    assert trace(jobs[0]).consts[0].dtype == F32, "the program itself is not changed"


def lengths_job(apply_fn, params):
    samples = [spec(1, n, 3, dtype=BF16) for n in (2, 4)]
    return stfuse.Job("job", apply_fn, params, samples, pad_values=0)


def test_programs_of_one_job_have_the_chains_that_all_of_them_have():
    base = jnp.ones((3, 3))

    def run(p, x):
        length = x.shape[1]
        y = x @ half(p["all"]) @ half(base) + half(p["place"])[:length]
        # At one length nothing is in the way of more, at the other it is read twice.
        y = y + half(jnp.exp(p["some"])) if length == 2 else y + p["some"].astype(BF16)
        return y * half(jnp.exp(jnp.sin(p["begins"]) if length == 2 else p["begins"]))

    params = {"all": W, "place": spec(4, 3), "some": B, "begins": B}
    found = hoisted(lengths_job(run, params))
    names = sorted(params)
    for traced, chains in zip(found.traces, found.chains, strict=True):
        (const,) = [i - len(names) for i in chains if i >= len(names)]
        assert traced.param_specs[len(names) + const].dtype == BF16
        assert [names[i] for i in chains if i < len(names)] == ["all", "place"]
    traces, _ = prepare(found, [np.ones(s.shape, F32) for s in params.values()])
    assert traces[0].consts[0] is traces[1].consts[0]


def stored(program):
    """Return a program whose weights are stored otherwise than it wants them."""
    specs = programs.outline(program).specs

    def restore(i, w):
        if i % 4 == 1:
            w = jnp.negative(-w)
        elif i % 4 == 2:
            w = w.T.T * 2 // 2 if w.dtype == np.int32 else w.T.T * 2 / 2
        elif i % 4 == 3:
            w = ((w + 1)[None] - 1)[0]
        return w.astype(specs[i].dtype)

    def run(weights, inputs):
        own = [restore(i, w) for i, w in enumerate(weights)]
        return programs.apply_fn(program)(own, inputs)

    return run


@settings(max_examples=EXAMPLES, suppress_health_check=list(hypothesis.HealthCheck))
@given(programs.programs(tuple(programs.ALL), 4))
def test_random_programs_give_the_same_hoisted(models):
    program = models[0]
    weights = [
        w.astype(F32 if w.dtype == ml_dtypes.bfloat16 else w.dtype)
        for w in programs.weights_of(program, 0)
    ]
    job = stfuse.Job("job", stored(program), weights, programs.example(program))
    inputs = jax.tree.leaves(
        jax.tree.map(lambda v: v[0], programs.inputs_of(program, 0, 1))
    )
    found = hoisted(job)
    (traced,), own = prepare(found, weights)
    both = jax.jit(lambda w, v, x: (evaluate(trace(job), w, x), evaluate(traced, v, x)))
    expected, actual = both(weights, own, inputs)
    case = programs.case_of(program)
    for a, e in zip(actual, expected, strict=True):
        cases.assert_same(np.asarray(a), np.asarray(e), case)
