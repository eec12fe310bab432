"""Jobs of variable length: padded to the smallest shape that holds a request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from stfuse._lengths import Lengths, carried_axes
from stfuse.testing import affine_job

WIDTH, LENGTHS = 5, (4, 8, 16)


def encode(params, x):
    """Return states of every token, their masked mean, and how many there are."""
    states = params["table"][x["ids"]] @ params["w"]
    mask = x["mask"][..., None]
    mean = (states * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
    return {"states": states, "mean": mean, "count": x["mask"].sum(-1)}


def sample(length, rows=1):
    return {
        "ids": np.zeros((rows, length), np.int32),
        "mask": np.zeros((rows, length), np.float32),
    }


def encoder(name, seed, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    params = {
        "table": rng.normal(size=(11, WIDTH)).astype(np.float32),
        "w": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32),
    }
    examples = [sample(n) for n in lengths]
    return stfuse.Job(name, encode, params, examples, pad_values={"ids": 0, "mask": 0})


def request(length, rows, seed=0):
    rng = np.random.default_rng((seed, length, rows))
    ids = rng.integers(0, 11, size=(rows, length)).astype(np.int32)
    return {"ids": ids, "mask": np.ones((rows, length), np.float32)}


def assert_alone(job, inputs, found):
    """Fused equals alone: the function on the request itself, never padded."""
    expected = job.apply_fn(job.params, inputs)
    for key in expected:
        assert found[key].shape == expected[key].shape
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 9, 16])
def test_a_request_is_answered_at_its_own_length(length):
    jobs = [encoder(f"e{i}", i) for i in range(3)]
    fused = stfuse.fuse(jobs, cost="cpu")
    bank = fused.pack()
    inputs = {job.name: request(length, 1 + i) for i, job in enumerate(jobs)}
    outputs = fused(bank, inputs)
    for job in jobs:
        assert_alone(job, inputs[job.name], outputs[job.name])


def test_requests_of_many_lengths_share_one_call():
    jobs = [encoder(f"e{i}", i) for i in range(5)] + [encoder("short", 9, (2, 3))]
    fused = stfuse.fuse([*jobs, affine_job("other")], cost="cpu")
    row = np.ones((1, 3), np.float32)
    lengths = (3, 4, 7, 16, 12, 2)
    inputs = {j.name: request(n, 2) for j, n in zip(jobs, lengths, strict=True)}
    for call in (fused, jax.jit(fused)):
        outputs = call(fused.pack(), {**inputs, "other": row})
        for job in jobs:
            assert_alone(job, inputs[job.name], outputs[job.name])
        np.testing.assert_array_equal(outputs["other"], row * 3)


def test_weights_are_kept_once_for_all_lengths():
    jobs = [encoder(f"e{i}", i) for i in range(2)]
    bank = stfuse.fuse(jobs, cost="cpu").pack()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(bank))
    own = sum(leaf.nbytes for job in jobs for leaf in jax.tree.leaves(job.params))
    assert held == own


def test_a_swap_reaches_every_length_and_no_other_job():
    jobs = [encoder(f"e{i}", i) for i in range(3)]
    fused = stfuse.fuse(jobs, cost="cpu")
    bank = fused.swap(fused.pack(), "e1", jobs[2].params)
    for length in (3, 7, 15):
        x = request(length, 1)
        outputs = fused(bank, {"e0": x, "e1": x, "e2": x})
        assert_alone(jobs[0], x, outputs["e0"])
        assert_alone(jobs[2], x, outputs["e1"])
        assert_alone(jobs[2], x, outputs["e2"])


def test_gradients_of_all_lengths_meet_in_the_shared_weights():
    job = encoder("e", 0)
    fused = stfuse.fuse([job, encoder("f", 1)], cost="cpu")
    xs = [request(n, 2) for n in (3, 6)]

    def loss(bank):
        return sum((fused(bank, {"e": x})["e"]["states"] ** 2).sum() for x in xs)

    def loss_alone(params):
        return sum((encode(params, x)["states"] ** 2).sum() for x in xs)

    found = jax.grad(loss)(fused.pack())
    expected = jax.grad(loss_alone)(job.params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-4)
        assert not np.asarray(a[1]).any()


@pytest.mark.parametrize("policy", ["time", "exclusive", "space-time"])
def test_the_engine_serves_all_lengths(policy):
    jobs = [encoder(f"e{i}", i, (4, 8)) for i in range(3)]
    rng = np.random.default_rng(0)
    with stfuse.Engine(policy=policy, max_batch_size=4) as engine:
        for ready in [engine.add(job) for job in jobs]:
            ready.result(100)
        compiles = engine.stats().compiles
        sent = []
        for i in range(120):
            job = jobs[rng.integers(3)]
            x = request(int(rng.integers(1, 9)), int(rng.integers(1, 5)), i)
            sent.append((job, x, engine.submit(job.name, x)))
        for job, x, future in sent:
            assert_alone(job, x, future.result(60))
        engine.swap("e0", jobs[1].params)
        for length in (3, 8):
            x = request(length, 1)
            assert_alone(jobs[1], x, engine.infer("e0", x))
            assert_alone(jobs[2], x, engine.infer("e2", x))
        engine.add(encoder("late", 7, (4, 8))).result(100)  # there is a free slot
        x = request(5, 1)
        assert_alone(encoder("late", 7), x, engine.infer("late", x))
        if policy == "space-time":
            assert engine.stats().compiles == compiles
        engine.remove("e1")
        assert_alone(jobs[2], x, engine.infer("e2", x))


def test_a_request_that_fits_none_names_the_lengths():
    job = encoder("e", 0)
    fused = stfuse.fuse([job], cost="cpu")
    with pytest.raises(stfuse.RequestError) as caught:
        fused.stack({"e": request(17, 1)})
    assert "fit none of its lengths: [4], [4]; [8], [8]; [16], [16]" in str(
        caught.value
    )


def test_axes_that_do_not_vary_must_fit_exactly():
    def apply_fn(params, x):
        return x * params

    examples = [np.zeros((1, n, 3), np.float32) for n in (2, 4)]
    job = stfuse.Job("j", apply_fn, np.float32(2), examples, pad_values=0.0)
    fused = stfuse.fuse([job], cost="cpu")
    answer = fused(fused.pack(), {"j": np.ones((2, 3, 3), np.float32)})["j"]
    np.testing.assert_array_equal(answer, np.full((2, 3, 3), 2.0))
    with pytest.raises(stfuse.RequestError, match=r"expected \[B,4,3\]"):
        fused.stack({"j": np.ones((1, 3, 2), np.float32)})


def test_padding_has_the_value_asked_for():
    def total(params, x):
        return x.sum(-1) + params

    examples = [np.zeros((1, n), np.float32) for n in (2, 4)]
    job = stfuse.Job("j", total, np.float32(0), examples, pad_values=10.0)
    fused = stfuse.fuse([job], cost="cpu")
    answer = fused(fused.pack(), {"j": np.ones((1, 3), np.float32)})["j"]
    np.testing.assert_array_equal(answer, [13.0])


@pytest.mark.parametrize(
    ("example", "pad_values", "text"),
    [
        (np.zeros((1, 2), "f"), 0, "two or more samples"),
        ([np.zeros((1, 2), "f")], 0, "two or more samples"),
        ([np.zeros((1, 2), "f")] * 2, 0, "same shapes"),
        ([np.zeros((1, 2), "f"), np.zeros((1, 2, 2), "f")], 0, "rank"),
        ([np.zeros((1, 2), "f"), (np.zeros((1, 4), "f"),)], 0, "structure"),
        ([np.zeros((1, 2), "f"), np.zeros((1, 4), "i4")], 0, "dtype"),
        ([np.zeros((1, 2), "f"), np.zeros((1, 4), "f")], "x", "pad_values"),
        ([np.zeros((1, 2), "f"), np.zeros((1, 4), "f")], [0, 1], "pad_values"),
    ],
)
def test_wrong_lengths_are_refused(example, pad_values, text):
    with pytest.raises(stfuse.JobError) as caught:
        stfuse.Job("j", lambda p, x: x, (), example, pad_values=pad_values)
    assert text in str(caught.value)


def test_carried_axes_are_those_that_follow_a_variable_input():
    inputs = [((4, 3), (7,)), ((8, 3), (7,))]
    outputs = [((4,), (3, 4), (2,), (7,)), ((8,), (3, 8), (4,), (7,))]
    assert carried_axes(inputs, outputs, lambda shapes: None) == (
        (((0, 0),),),
        ((), ((0, 0),)),
        ((),),  # halved, so it follows no input
        ((),),
    )


def cross(params, x):
    """Attend from every target to all sources that are not padding."""
    keys, queries = params[jnp.maximum(x["src"], 0)], params[jnp.maximum(x["tgt"], 0)]
    scores = jnp.einsum("btd,bsd->bts", queries, keys)
    scores = jnp.where(x["src"][:, None] >= 0, scores, -1e9)
    return {"out": jax.nn.softmax(scores) @ keys, "keys": keys}


def masked_cross(params, x):
    """Attend as above, each side with a mask that must be as long as its ids."""
    keys = params[x["src"]] * x["src_mask"][..., None]
    queries = params[x["tgt"]] * x["tgt_mask"][..., None]
    return {"out": jnp.einsum("btd,bsd,bse->bte", queries, keys, keys), "keys": keys}


def both(src, tgt):
    rng = np.random.default_rng((src, tgt))
    tree = {"src": src, "tgt": tgt}
    return {k: rng.integers(0, 7, (2, n)).astype(np.int32) for k, n in tree.items()}


def both_masked(src, tgt):
    inputs = both(src, tgt)
    masks = {f"{k}_mask": np.ones((2, x.shape[1]), "f") for k, x in inputs.items()}
    return {**inputs, **masks}


@pytest.mark.parametrize(
    ("apply_fn", "inputs_of", "pad_value"),
    [(cross, both, -1), (masked_cross, both_masked, 0)],
)
@pytest.mark.parametrize("lengths", [(8, 16), (1, 8)])
@pytest.mark.parametrize(("src", "tgt"), [(3, 6), (6, 3), (1, 8), (5, 5)])
def test_an_output_is_cut_by_the_input_that_it_follows(
    apply_fn, inputs_of, pad_value, lengths, src, tgt
):
    params = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    examples = [inputs_of(n, n) for n in lengths]
    job = stfuse.Job("j", apply_fn, params, examples, pad_values=pad_value)
    fused = stfuse.fuse([job], cost="cpu")
    inputs = inputs_of(src, tgt)
    assert_alone(job, inputs, fused(fused.pack(), {"j": inputs})["j"])


def test_both_axes_of_a_square_are_cut_by_their_own_length():
    examples = [np.zeros((1, n, n), np.float32) for n in (4, 8)]
    job = stfuse.Job("j", lambda p, x: x * p, np.float32(2), examples, pad_values=0.0)
    fused = stfuse.fuse([job], cost="cpu")
    answer = fused(fused.pack(), {"j": np.ones((1, 2, 7), np.float32)})["j"]
    np.testing.assert_array_equal(answer, np.full((1, 2, 7), 2.0))


def test_what_an_output_may_follow_must_have_one_length():
    job = encoder("e", 0)
    fused = stfuse.fuse([job], cost="cpu")
    inputs = {**request(3, 1), "mask": np.ones((1, 4), np.float32)}
    with pytest.raises(stfuse.RequestError) as caught:
        fused.stack({"e": inputs})
    assert (
        "inputs leaf 'ids' has 3 along axis 1 and inputs leaf 'mask' has 4 along axis "
        "1; the outputs may be as long as either. Pass one size" in str(caught.value)
    )


def test_lengths_are_told_apart_once_for_all_tenants_of_a_function():
    calls = []

    def apply_fn(params, x):
        calls.append(jax.tree.map(jnp.shape, x))
        return x["ids"] + x["mask"] * params

    for name in ("a", "b"):
        examples = [sample(n) for n in (4, 8)]
        stfuse.Job(name, apply_fn, np.float32(1), examples, pad_values=0)
    sizes = [(call["ids"][1], call["mask"][1]) for call in calls]
    assert sizes == [(4, 4), (8, 8), (8, 4), (4, 8)]


def test_the_smallest_length_that_holds_a_request_is_taken():
    lengths = Lengths((((2, 4),), ((4, 4),), ((4, 8),)), (0,), ((),))
    assert [lengths.fit((s,)) for s in [(1, 1), (3, 4), (2, 5), (5, 1), (1,)]] == [
        0,
        1,
        2,
        None,
        None,
    ]


def test_lone_jobs_of_several_lengths_share_launches():
    def chain(name, num, width):
        params = [np.full((width, width), i + 1, "f") for i in range(num)]
        examples = [np.ones((1, length, width), "f") for length in (4, 8)]
        return stfuse.Job(name, dense_chain, params, examples, pad_values=0.0)

    plan = stfuse.fuse([chain("a", 12, 6), chain("b", 11, 8)], cost="h200").plan
    assert plan.num_launches_alone == 2 * (12 + 11)
    assert plan.num_launches == 2 * 12


def dense_chain(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x
