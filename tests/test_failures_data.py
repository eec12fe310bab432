"""FAILURES rows 1 to 4, the walls between jobs of one step.

Nothing that one job sends or is changes another.

Equality is bit for bit everywhere here: at one bucket, the bytes of a job's answer
depend on its weights, its rows, and nothing else.
"""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import stfuse
from tests import cases
from tests.cases import BY_NAME, CASES, alone, assert_bitwise, assert_same

over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_row_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if c.batched], ids=str
)
POISON = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 3e38}
ROWS = (3, 1, 2)


def is_inexact(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def poisoned(tree, value):
    """Return a tree whose every inexact leaf is one value throughout."""

    def poison(x):
        if not is_inexact(x):
            return x
        if not hasattr(x, "dtype"):
            return float(value)
        with np.errstate(over="ignore"):  # 3e38 is infinite in float16
            full = np.full(x.shape, value).astype(x.dtype)
        return jnp.asarray(full, x.dtype) if isinstance(x, jax.Array) else full

    return jax.tree.map(poison, tree)


def others(outs, name):
    return {other: y for other, y in outs.items() if other != name}


def filled(buffer, taken, value):
    """Return a staged buffer with every row that nobody asked for poisoned."""
    if buffer is None or not is_inexact(buffer):
        return buffer
    free = np.ones(buffer.shape[:2], bool)
    for at, rows in taken:
        free[at, :rows] = False
    with np.errstate(over="ignore"):
        return np.where(
            free.reshape(*free.shape, *(1,) * (buffer.ndim - 2)),
            np.asarray(value, buffer.dtype),
            buffer,
        )


def poison_padding(fused, stacked, requests, value):
    """Return staged inputs whose rows and slots of padding hold poison."""
    own = {}
    for name, x in requests.items():
        ((species, slot),) = fused._where[name]
        leaves = jax.tree.leaves(x)
        rows = len(leaves[0]) if fused.jobs[name].batched else 1
        own.setdefault(species, []).append((slot, rows))
    width = {s: len(fused._slots(s, dict(slots))) for s, slots in own.items()}
    buffers = []
    for buffer, array in zip(fused._layout.inputs, stacked.inputs, strict=True):
        starts, taken = buffer.starts(width), []
        for s, _ in buffer.members:
            taken += [
                (starts[s] + k, rows)
                for k, (_, rows) in enumerate(sorted(own.get(s, ())))
            ]
        buffers.append(filled(array, taken, value))
    return dataclasses.replace(stacked, inputs=tuple(buffers))


# Rows that each job sends, or 0 for a job that sends nothing: one for each bucket of
# three slots and four rows, the one that other tests use first.
BUCKETS = (ROWS, (1, 1, 1), (0, 2, 1), (3, 0, 4), (0, 0, 1), (0, 2, 0), (0, 3, 0))


def asked(case, fused, rows):
    """Return a request for each job that sends rows."""
    return {
        name: case.inputs(i, n)
        for i, (name, n) in enumerate(zip(fused.jobs, rows, strict=True))
        if n
    }


def assert_poison_stays(fused, requests, name, value, where):
    """Poison one job's weights or inputs, or all padding: no other answer changes."""
    bank = fused.pack()
    clean = fused(bank, requests)
    if where == "padding":
        stacked = poison_padding(fused, fused.stack(requests), requests, value)
        assert_bitwise(fused.split(fused.step(bank, stacked)), clean)
        return
    if where == "weights":
        bank = fused.pack({name: poisoned(fused.jobs[name].params, value)})
    elif name in requests:
        requests = {**requests, name: poisoned(requests[name], value)}
    assert_bitwise(others(fused(bank, requests), name), others(clean, name))


def poison_some(case, rows, seed, num_examples):
    """Have hypothesis pick who is poisoned, with what and where, in one bucket."""
    fused = cases.group(case, 3)
    requests = asked(case, fused, rows)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=num_examples)
    @hypothesis.given(
        st.sampled_from(list(fused.jobs)),
        st.sampled_from(list(POISON)),
        st.sampled_from(["weights", "inputs", "padding"]),
    )
    def check(name, what, where):
        assert_poison_stays(fused, requests, name, POISON[what], where)

    check()


@over_cases
def test_failure_01_poison_of_one_job_changes_no_bit_of_the_others(case, seed):
    poison_some(case, ROWS, seed, num_examples=12)


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "lstm", "attention", "embedding", "mixed_dtypes", "linen"]
)
def test_failure_01_poison_stays_where_it_is_in_every_bucket(name, seed):
    for rows in BUCKETS:
        poison_some(BY_NAME[name], rows, seed, num_examples=6)


@over_row_cases
def test_failure_01_poison_in_one_row_reaches_no_other_row(case):
    fused = cases.group(case, 3)
    bank, requests = fused.pack(), cases.requests(case, fused, ROWS)
    clean = fused(bank, requests)
    name = next(iter(requests))  # three rows
    for row in range(3):
        bad = jax.tree.map(np.copy, requests[name])
        for leaf in filter(is_inexact, jax.tree.leaves(bad)):
            leaf[row] = np.nan
        outs = fused(bank, {**requests, name: bad})
        left = [r for r in range(3) if r != row]
        assert_bitwise(
            jax.tree.map(lambda y, left=left: y[left], outs[name]),
            jax.tree.map(lambda y, left=left: y[left], clean[name]),
        )
        assert_bitwise(others(outs, name), others(clean, name))


@over_cases
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_failure_01_a_jobs_own_poison_comes_out_where_it_would_alone(case, value):
    fused = cases.group(case, 3)
    requests = cases.requests(case, fused, ROWS)
    name = next(iter(requests))
    x = jax.tree.map(np.copy, requests[name])
    for leaf in filter(is_inexact, jax.tree.leaves(x)):
        if leaf.size:
            leaf[-1].flat[0] = value
    assert_same(
        fused(fused.pack(), {**requests, name: x})[name],
        alone(fused.jobs[name], x),
        case,
    )


@pytest.mark.parametrize("widths", [(3, 3, 3), (3, 5, 3)], ids=["equal", "unlike"])
def test_failure_01_poison_beside_a_shared_trunk_reaches_no_other_job(widths):
    rng = np.random.default_rng(0)
    trunk = rng.normal(size=(4, 3)).astype("f")
    jobs = [
        stfuse.Job(
            name,
            lambda p, x: jnp.tanh(x @ p["trunk"]) @ p["head"],
            {"trunk": trunk, "head": rng.normal(size=(3, width)).astype("f")},
            np.ones((1, 4), "f"),
        )
        for name, width in zip("abc", widths, strict=True)
    ]
    fused = stfuse.fuse(jobs, cost="h200")
    bank = fused.pack()
    assert fused.plan.num_launches == 2  # shared by all, whatever the widths
    # The trunk is kept once.
    assert sorted(x.shape for x in bank.stacks) == [(3, 3, max(widths)), (4, 3)]
    requests = {n: rng.normal(size=(2, 4)).astype("f") for n in "abc"}
    clean = fused(bank, requests)
    for value in POISON.values():
        for sick in "ab":
            bad = {**requests, sick: poisoned(requests[sick], value)}
            assert_bitwise(others(fused(bank, bad), sick), others(clean, sick))


@over_row_cases
def test_failure_02_a_row_has_the_same_bytes_whatever_else_is_sent_at_its_bucket(case):
    fused = cases.group(case, 3)
    bank, requests = fused.pack(), cases.requests(case, fused, ROWS)
    first, *rest = requests
    clean = fused(bank, requests)
    busy = {name: case.inputs(50 + i, 1 + i) for i, name in enumerate(rest)}
    assert_bitwise(fused(bank, {first: requests[first], **busy})[first], clean[first])
    for row in range(3):  # its own other rows, too
        mixed = jax.tree.map(np.copy, case.inputs(99, 4))
        for to, source in zip(
            jax.tree.leaves(mixed), jax.tree.leaves(requests[first]), strict=True
        ):
            to[row] = source[row]
        outs = fused(bank, {first: mixed, **busy})
        assert_bitwise(
            jax.tree.map(lambda y, row=row: y[row], outs[first]),
            jax.tree.map(lambda y, row=row: y[row], clean[first]),
        )


@over_cases
def test_failure_02_an_answer_has_the_same_bytes_in_whichever_slot_its_job_sits(case):
    fused = cases.group(case, 3)
    bank = fused.pack()
    first, second, third = fused.jobs
    x = case.inputs(7, 4)
    beside_first = fused(bank, {first: case.inputs(8, 4), second: x})
    beside_third = fused(bank, {second: x, third: case.inputs(9, 4)})
    assert_bitwise(beside_first[second], beside_third[second])
    assert_same(beside_third[second], alone(fused.jobs[second], x), case)


@pytest.mark.parametrize("name", ["mlp", "cnn", "conv", "attention", "lstm", "linen"])
def test_failure_02_an_answer_has_the_same_bytes_in_any_order_of_jobs(
    name,
):
    case = BY_NAME[name]
    requests = {f"{name}.{seed}": case.inputs(seed, 2) for seed in range(3)}
    answers = []
    for order in ((0, 1, 2), (2, 0, 1)):
        fused = stfuse.fuse([cases.job(case, seed) for seed in order], cost="cpu")
        answers.append(fused(fused.pack(), requests))
    assert_bitwise(answers[1], answers[0])


# Out-of-range ids: each job's table holds canaries, values that name job and row.
VOCABULARY = 4
CANARIES = {
    name: np.arange(VOCABULARY, dtype=np.float32)[:, None] + 100 * (i + 1)
    for i, name in enumerate("abc")
}
BAD_IDS = np.array([0, 3, 4, 7, 1000, 2**31 - 1, -1, -4, -5, -1000, -(2**31)], "i4")
LOOKUPS = {
    "index": lambda table, i: table[i],
    "take_fill": lambda table, i: jnp.take(table, i, axis=0),
    "take_clip": lambda table, i: jnp.take(table, i, axis=0, mode="clip"),
    "take_wrap": lambda table, i: jnp.take(table, i, axis=0, mode="wrap"),
    "at_get_drop": lambda table, i: table.at[i].get(mode="drop"),
    "at_get_fill": lambda table, i: table.at[i].get(mode="fill", fill_value=-7),
    "take_along_axis": lambda table, i: jnp.take_along_axis(table, i[:, None], axis=0),
    "dynamic_slice": lambda table, i: lax.dynamic_slice(table, (i[0], 0), (1, 1)),
    "scatter": lambda table, i: table.at[i].set(-7.0)[None],
    "scatter_add": lambda table, i: table.at[i].add(0.5)[None],
    "dynamic_update": lambda table, i: lax.dynamic_update_slice(
        table, jnp.full((1, 1), -7.0), (i[0], 0)
    )[None],
}


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_failure_03_an_out_of_range_id_never_reads_a_neighbors_row(lookup):
    jobs = [
        stfuse.Job(name, lookup, table, np.zeros(1, np.int32))
        for name, table in CANARIES.items()
    ]
    fused = stfuse.fuse(jobs, cost="cpu")
    bank = fused.pack()
    requests = {name: np.roll(BAD_IDS, 3 * i) for i, name in enumerate(CANARIES)}
    outs = fused(bank, requests)
    for i, (name, x) in enumerate(requests.items()):
        assert_bitwise(outs[name], alone(fused.jobs[name], x))
        owners = np.floor(outs[name] / 100)
        legal = (owners == i + 1) | np.isnan(outs[name]) | (outs[name] < 0)
        assert legal.all()


def test_failure_04_what_is_refused_leaves_the_bank_and_the_jobs_as_they_were():
    case = BY_NAME["mlp"]
    fused = cases.group(case, 3)
    bank, requests = fused.pack(), cases.requests(case, fused, ROWS)
    clean = fused(bank, requests)
    first = next(iter(requests))
    with pytest.raises(stfuse.RequestError):
        fused(bank, {**requests, first: np.zeros((2, 3))})
    with pytest.raises(stfuse.JobError):
        fused.swap(bank, first, {"no": np.zeros(3)})
    with pytest.raises(stfuse.JobError):
        fused.pack({first: {"no": np.zeros(3)}})
    assert_bitwise(fused(bank, requests), clean)
