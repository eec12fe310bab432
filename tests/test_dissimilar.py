"""Unlike jobs in shared launches: every launch right, whatever padding holds."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import stfuse
from tests import cases, functions, lockstep
from tests.cases import BY_NAME, CASES, alone, assert_same
from tests.model_cases import SIBLINGS

MODELS = [
    tuple(dataclasses.replace(case, name=f"model_{case}") for case in pair)
    for pair in SIBLINGS
]
KINDS = {**BY_NAME, **{case.name: case for pair in MODELS for case in pair}}
ROWS = (1, 3, 2, 1, 2)


def fused_of(kinds, cost="h200", **options):
    """Fuse one job of each kind; a kind that comes again has other weights."""
    seeds = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
    jobs = [cases.job(kind, seed) for kind, seed in zip(kinds, seeds, strict=True)]
    return stfuse.fuse(jobs, cost=cost, **options)


def requests_of(fused, rows):
    return {
        name: kind_of(name).inputs(i, n)
        for i, (name, n) in enumerate(zip(fused.jobs, itertools.cycle(rows)))  # noqa: B905
    }


def kind_of(name):
    return KINDS[name.split(".")[0]]


def check(fused, outs, requests):
    assert set(outs) == set(requests)
    for name, x in requests.items():
        assert_same(outs[name], alone(fused.jobs[name], x), kind_of(name))


def check_launches(fused):
    requests = requests_of(fused, (1,))
    check(fused, lockstep.run(fused, requests), requests)


def check_call(fused, rows=ROWS):
    requests = requests_of(fused, rows)
    check(fused, fused(fused.pack(), requests), requests)


@pytest.mark.parametrize("pair", MODELS, ids=lambda pair: f"{pair[0]}+{pair[1]}")
def test_launches_of_sibling_models_are_right(pair):
    fused = fused_of([pair[0], pair[1], pair[0]])
    assert any(len(node.members) > 1 for node in fused.plan.nodes)
    check_launches(fused)


# Each case beside one that shares some of its primitives, and itself again.
PAIRS = [(CASES[i], CASES[(i + 7) % len(CASES)]) for i in range(len(CASES))] + [
    tuple(BY_NAME[name] for name in names)
    for names in (
        *itertools.combinations(("conv", "grouped_conv", "transposed_conv", "cnn"), 2),
        *itertools.combinations(("lstm", "closed_in_scan", "attention", "mlp"), 2),
    )
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}+{pair[1]}")
def test_launches_of_unlike_cases_are_right(pair):
    check_launches(fused_of([pair[0], pair[1], pair[0]]))


@pytest.mark.parametrize("pair", MODELS[:5], ids=lambda pair: f"{pair[0]}+{pair[1]}")
@pytest.mark.parametrize("max_waste", [None, 0.5])
def test_sibling_models_answer_as_alone(pair, max_waste):
    check_call(fused_of([pair[0], pair[1], pair[1]], max_waste=max_waste), (2, 1, 3))


def test_one_job_fused_alone_is_itself():
    for name in ("attention", "cnn", "lstm"):
        fused = fused_of([BY_NAME[name]])
        assert fused.plan.num_launches == fused.plan.num_launches_alone
        check_launches(fused)


# One architecture at several sizes, with all that padding can get wrong.


def model(params, x):
    """A normed token mixer: embedding, attention, a recurrence, an order."""
    ids = jnp.clip(jnp.round(x["x"]).astype(jnp.int32) + 2, -2, 99)
    y = params["table"][ids].sum(-2) + x["x"] @ params["in"]
    y = (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 0.1)
    scores = jnp.einsum("btf,bsf->bts", y, y @ params["mix"]) / np.sqrt(y.shape[-1])
    y = jax.nn.softmax(scores) @ y

    def turn(h, row):
        h = jnp.tanh(h @ params["mix"] + row)
        return h, h.max(-1)

    h, peaks = lax.scan(turn, y[:, 0], jnp.swapaxes(y, 0, 1))
    top, _ = lax.top_k(h, 2)
    return {"out": h @ params["out"], "top": top, "peaks": peaks.T}


def size_of(i):
    return ((3, 4, 5), (2, 7, 3), (6, 3, 8), (1, 5, 2), (4, 4, 13))[i]


@functools.cache
def sized(i, seed, name=None):
    time, features, hidden = size_of(i)
    table, w, mix, out = functions.weights(
        seed, (5 + i, hidden), (features, hidden), (hidden, hidden), (hidden, 1 + i)
    )
    params = {"table": table, "in": w, "mix": mix, "out": out}
    x = {"x": jax.ShapeDtypeStruct((1, time, features), np.float32)}
    return stfuse.Job(name or f"{i}.{seed}", model, params, x)


def sized_inputs(name, rows, seed=0):
    time, features, _ = size_of(int(name.split(".")[0]))
    rng = np.random.default_rng([seed, *map(int, name.split("."))])
    return {"x": functions.normal(rng, rows, time, features)}


SIZED = cases.Case("sized", lambda seed: (), lambda rng, rows: None, 100)


@functools.cache
def sizes_fused():
    jobs = [sized(i, seed) for i in range(5) for seed in range(2)]
    return stfuse.fuse(jobs, cost="h200")


def sized_requests(names, rows=(2, 1, 3), seed=0):
    return {
        name: sized_inputs(name, n, seed)
        for name, n in zip(names, itertools.cycle(rows))  # noqa: B905
    }


def check_sized(outs, requests, fused=None):
    assert set(outs) == set(requests)
    for name, x in requests.items():
        job = (fused or sizes_fused()).jobs[name]
        assert_same(outs[name], alone(job, x), SIZED)


def test_one_architecture_at_five_sizes_shares_its_launches():
    fused = sizes_fused()
    assert fused.plan.num_launches_alone >= 50
    shared = [x for x in fused.plan.launches if len(x.jobs) == 10]
    assert {x.primitive for x in shared} >= {"dot_general", "scan", "top_k"}
    requests = sized_requests(fused.jobs, (1,))
    check_sized(lockstep.run(fused, requests), requests)


def test_a_hundred_jobs_of_five_sizes_answer_as_alone():
    jobs = [sized(i, seed) for seed in range(20) for i in range(5)]
    fused = stfuse.fuse(jobs, cost="h200")
    assert len(fused.plan.species) == 5
    requests = sized_requests(fused.jobs, (1, 2))
    outs = fused(fused.pack(), requests)
    some = dict(itertools.islice(requests.items(), 0, None, 7))
    check_sized({name: outs[name] for name in some}, some, fused)


@pytest.mark.parametrize(
    "names",
    [("0.0",), ("4.1", "1.0"), ("3.0", "3.1", "0.1"), ("2.1", "0.0", "1.1", "4.0")],
    ids="+".join,
)
def test_unlike_jobs_that_a_call_names_answer_as_alone(names):
    fused = sizes_fused()
    requests = sized_requests(names)
    check_sized(fused(fused.pack(), requests), requests)
    first = sized_requests(names, (1,))
    check_sized(lockstep.run(fused, first), first)


def stacked(trees):
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)


def turns_of(fused):
    return [sized_requests(fused.jobs, (2,), seed) for seed in range(3)]


def check_turns(outs, turns):
    for t, requests in enumerate(turns):
        own = jax.tree.map(lambda y, t=t: np.asarray(y[t]), outs)
        some = {name: requests[name] for name in list(requests)[t::3]}
        check_sized({name: own[name] for name in some}, some)


def test_unlike_jobs_answer_inside_jit():
    fused, requests = sizes_fused(), sized_requests(sizes_fused().jobs)
    check_sized(jax.jit(fused.__call__)(fused.pack(), requests), requests)


def test_unlike_jobs_answer_inside_scan():
    fused, turns = sizes_fused(), turns_of(sizes_fused())
    bank = fused.pack()
    run = jax.jit(lambda xs: lax.scan(lambda c, x: (c, fused(bank, x)), 0, xs)[1])
    check_turns(run(stacked(turns)), turns)


def test_unlike_jobs_answer_under_vmap():
    fused, turns = sizes_fused(), turns_of(sizes_fused())
    bank = fused.pack()
    check_turns(jax.jit(jax.vmap(lambda x: fused(bank, x)))(stacked(turns)), turns)


def test_unlike_jobs_answer_inside_while_loop():
    def block(params, x):
        return jnp.tanh(x @ params)

    widths = (3, 5, 8)
    jobs = [
        stfuse.Job(str(n), block, functions.weights(n, (n, n))[0], np.ones((1, n), "f"))
        for n in widths
    ]
    fused = stfuse.fuse(jobs, cost="h200")
    assert fused.plan.num_launches == 1
    bank = fused.pack()
    x = {str(n): functions.normal(np.random.default_rng(n), 2, n) for n in widths}
    _, outs = jax.jit(
        lambda x: lax.while_loop(
            lambda state: state[0] < 4,
            lambda state: (state[0] + 1, fused(bank, state[1])),
            (0, x),
        )
    )(jax.tree.map(jnp.asarray, x))
    for name, y in x.items():
        for _ in range(4):
            y = alone(fused.jobs[name], y)
        assert_same(np.asarray(outs[name]), y, SIZED)


def test_loops_of_unlike_lengths_and_bodies_share_no_xs_but_turns():
    def job(name, length, read):
        def rnn(params, x):
            turn = lambda h, row: (jnp.tanh(h @ params + read(row)), h)  # noqa: E731
            return jax.vmap(lambda x: lax.scan(turn, jnp.zeros(3), x))(x)

        params = functions.weights(length, (3, 3))[0]
        return stfuse.Job(name, rnn, params, np.ones((1, length, 5), "f"))

    jobs = [job("long", 4, lambda row: row.max()), job("short", 2, lambda row: row[2])]
    fused = stfuse.fuse(jobs, cost="h200")
    assert "scan" in {x.primitive for x in fused.plan.launches if len(x.jobs) == 2}
    requests = {
        job.name: functions.normal(np.random.default_rng(0), 2, *job.row.shape)
        for job in jobs
    }
    outs = fused(fused.pack(), requests)
    for name, x in requests.items():
        assert_same(outs[name], alone(fused.jobs[name], x), SIZED)


def test_some_slots_of_a_loop_that_unlike_jobs_share_read_their_own_weights():
    def rnn(params, x):
        def turn(h, row):
            h = jnp.tanh(h @ params["h"] + row @ params["x"])
            return h, h

        def run(x):
            return lax.scan(turn, jnp.zeros(len(params["h"])), x)[1]

        return jax.vmap(run)(x)

    rng = np.random.default_rng(0)
    jobs = [
        stfuse.Job(
            f"{size}{i}",
            rnn,
            {"h": rng.normal(size=(size, size)), "x": rng.normal(size=(5, size))},
            np.ones((1, 4, 5), "f"),
        )
        for size in (3, 4)
        for i in range(3)
    ]
    fused = stfuse.fuse(jobs, cost="h200")
    assert "scan" in {x.primitive for x in fused.plan.launches if len(x.jobs) == 6}
    requests = {name: rng.normal(size=(2, 4, 5)).astype("f") for name in ("31", "42")}
    outs = fused(fused.pack(), requests)
    for name, x in requests.items():
        assert_same(outs[name], alone(fused.jobs[name], x), SIZED)


def test_jobs_of_several_dtypes_are_never_in_one_launch():
    def dense(params, x):
        return jax.nn.relu(x @ params) @ params.T

    dtypes = {"float": np.float32, "half": np.float16, "brain": jnp.bfloat16}
    dtypes["whole"] = np.int32
    jobs = [
        stfuse.Job(
            f"{kind}{n}", dense, np.ones((n, 2 * n), dtype), np.ones((1, n), dtype)
        )
        for kind, dtype in dtypes.items()
        for n in (2, 3)
    ]
    fused = stfuse.fuse(jobs, cost="h200")
    launches = [set(x.jobs) for x in fused.plan.launches]
    own = [{f"{kind}2", f"{kind}3"} for kind in dtypes for _ in range(2)]
    assert sorted(map(sorted, launches)) == sorted(map(sorted, own))
    requests = {
        job.name: np.arange(job.example.shape[1])[None].astype(job.example.dtype)
        for job in jobs
    }
    outs = fused(fused.pack(), requests)
    for name, x in requests.items():
        np.testing.assert_array_equal(outs[name], alone(fused.jobs[name], x))


def test_a_trunk_that_unlike_heads_share_is_one_unbatched_product():
    (trunk,) = functions.weights(0, (64, 64))

    def head(params, x):
        y = jax.nn.relu(x @ params["trunk"]) @ params["w"]
        return jnp.tanh(y) if y.shape[-1] == 3 else y.sum(-1)

    def job(name, seed, width):
        params = {"trunk": trunk, "w": functions.weights(seed, (64, width))[0]}
        return stfuse.Job(name, head, params, np.ones((1, 64), "f"))

    jobs = [job(f"{width}.{i}", i, width) for width in (2, 3, 5) for i in range(3)]
    fused = stfuse.fuse(jobs, cost="h200")
    first, second = fused.plan.launches
    assert len(first.jobs) == len(second.jobs) == 9
    assert (first.waste, first.shape) == (0.0, (1, 64))
    bank = fused.pack()
    assert sorted(x.shape for x in bank.stacks) == [(9, 64, 5), (64, 64)]
    heads = 64 * (2 + 3 + 5) * 3
    assert fused.plan.param_bytes_alone == 4 * (9 * 64 * 64 + heads)
    requests = {
        name: functions.normal(np.random.default_rng(i), 2, 64)
        for i, name in enumerate(fused.jobs)
    }
    dots = [
        eqn.invars[1].aval.shape
        for eqn in _eqns(jax.make_jaxpr(fused.__call__)(bank, requests).jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert (64, 64) in dots and (9, 64, 64) not in dots
    outs = fused(bank, requests)
    for name, x in requests.items():
        assert_same(outs[name], alone(fused.jobs[name], x), SIZED)
    lockstep.run(fused, requests)


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4])
def test_ids_of_four_bits_find_what_they_find_alone(dtype):
    numbers = lax.GatherDimensionNumbers((), (0,), (0,))

    def look_up(ids, x):
        found = lax.gather(x[0], ids[:, None], numbers, (1,), mode="clip")
        cut = lax.dynamic_slice(x[0], ids[:1], (2,))
        return {"found": found[None], "cut": cut[None]}

    ids = jnp.asarray([7, 2, 4], dtype)
    rows = {str(n): np.arange(n, dtype="f")[None] for n in (4, 7)}
    jobs = [stfuse.Job(name, look_up, ids, x) for name, x in rows.items()]
    fused = stfuse.fuse(jobs, cost="h200")
    outs = fused(fused.pack(), rows)
    for name, x in rows.items():
        cases.assert_bitwise(outs[name], alone(fused.jobs[name], x))


def _eqns(jaxpr):
    """Yield every equation, those of bodies included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _eqns(inner)
