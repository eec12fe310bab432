"""Plans of unlike jobs, against plans derived by hand from their architectures.

Every pair is planned for an H200, where a launch costs as much as moving 13 MB: any two
ops of these sizes that may share a launch should. Parameters are shapes only, so
nothing is computed.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from models import bert, cnn, lstm, mlp, resnet
from stfuse import _align, _merge, _trace
from stfuse._cost import RECORDS

H200 = RECORDS["h200"]
DOT, CONV, SCAN = "dot_general", "conv_general_dilated", "scan"
NO_PARTNER = "no partner is left"


def spec(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct((1, *shape), dtype)


IMAGE, STEPS = spec(8, 8), spec(5, 6)
TOKENS = {"ids": spec(6, dtype=np.int32), "mask": spec(6, dtype=np.int32)}


def job(name, module, config, example, dtype=None):
    """Return a job of a model whose parameters are shapes."""
    params = jax.eval_shape(functools.partial(module.init, config), jax.random.key(0))
    if dtype is not None:
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    return stfuse.Job(name, functools.partial(module.apply, config), params, example)


def perceptron(name, *widths):
    return job(name, mlp, mlp.Config(widths=widths), IMAGE)


def convolutional(name, *channels):
    return job(name, cnn, cnn.Config(channels=channels), IMAGE)


def encoder(name, layers, width, heads, mlp_width, **options):
    sizes = {"layers": layers, "width": width, "heads": heads, "mlp_width": mlp_width}
    config = bert.Config(vocab=97, max_positions=16, **sizes, **options)
    return job(name, bert, config, TOKENS)


def recurrent(name, hidden):
    config = lstm.Config(features=6, hidden=hidden, num_classes=4)
    return job(name, lstm, config, STEPS)


def plan_of(*jobs, **options):
    return stfuse.fuse(jobs, cost="h200", **options).plan


def rows_of(plan):
    """Return (primitive, jobs, shape at one row, rounded waste) of every launch."""
    return [
        (x.primitive, "".join(x.jobs), x.shape, round(x.waste, 2))
        for x in plan.launches
    ]


def wasted(padded, *true):
    """Return the waste of members of some sizes, each computed at the padded size."""
    return round(len(true) * padded / sum(true) - 1, 2)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two jobs and the plan that they should have.

    Launches that do not wait for one another may stand in either order. Partners are
    places among the heavy ops of a and of b; where several choices are as good, any.
    """

    name: str
    make_jobs: Callable
    launches: list
    partners: list
    why_solo: dict = dataclasses.field(default_factory=dict)


PAIRS = [
    # 64 -> 128 -> 64 -> 10 and 64 -> 96 -> 32 -> 10, layer by layer.
    Pair(
        "mlp_widths",
        lambda: [perceptron("a", 128, 64), perceptron("b", 96, 32)],
        [
            (DOT, "ab", (1, 128), wasted(64 * 128, 64 * 128, 64 * 96)),
            (DOT, "ab", (1, 64), wasted(128 * 64, 128 * 64, 96 * 32)),
            (DOT, "ab", (1, 10), wasted(64 * 10, 64 * 10, 32 * 10)),
        ],
        partners=[[(0, 0), (1, 1), (2, 2)]],
    ),
    # 64 -> 256 -> 256 -> 256 -> 256 -> 10 and 64 -> 256 -> 256 -> 10: first with
    # first, last with last, and one of the equal ones between: no work is wasted.
    Pair(
        "mlp_depths",
        lambda: [perceptron("a", 256, 256, 256, 256), perceptron("b", 256, 256)],
        [
            (DOT, "ab", (1, 256), 0.0),
            (DOT, "ab", (1, 256), 0.0),
            (DOT, "a", (1, 256), 0.0),
            (DOT, "a", (1, 256), 0.0),
            (DOT, "ab", (1, 10), 0.0),
        ],
        partners=[[(0, 0), (i, 1), (4, 2)] for i in (1, 2, 3)],
        why_solo={(1, 256): NO_PARTNER},
    ),
    # Equal first convolutions; a third one of b's own; a's head reads 2x2x32 values,
    # b's 1x1x64.
    Pair(
        "cnn_depths",
        lambda: [convolutional("a", 16, 32), convolutional("b", 16, 32, 64)],
        [
            (CONV, "ab", (1, 8, 8, 16), 0.0),
            (CONV, "ab", (1, 4, 4, 32), 0.0),
            (CONV, "b", (1, 2, 2, 64), 0.0),
            (DOT, "ab", (1, 10), wasted(128, 128, 64)),
        ],
        partners=[[(0, 0), (1, 1), (2, 3)]],
        why_solo={(1, 2, 2, 64): NO_PARTNER},
    ),
    # A layer is query, key, value, scores (heads x T x T), mixed values (heads x
    # features of a head x T), out, up, down. Heads are 2 of 8 features and 4 of 6.
    Pair(
        "encoders",
        lambda: [encoder("a", 1, 16, 2, 32), encoder("b", 2, 24, 4, 40)],
        [
            (DOT, "ab", (1, 6, 24), wasted(24 * 24, 16 * 16, 24 * 24)),
            (DOT, "ab", (1, 6, 24), wasted(24 * 24, 16 * 16, 24 * 24)),
            (DOT, "ab", (1, 6, 24), wasted(24 * 24, 16 * 16, 24 * 24)),
            (DOT, "ab", (1, 4, 6, 6), wasted(4 * 8, 2 * 8, 4 * 6)),
            (DOT, "ab", (1, 4, 8, 6), wasted(4 * 8, 2 * 8, 4 * 6)),
            (DOT, "ab", (1, 6, 24), wasted(24 * 24, 16 * 16, 24 * 24)),
            (DOT, "ab", (1, 6, 40), wasted(24 * 40, 16 * 32, 24 * 40)),
            (DOT, "ab", (1, 6, 24), wasted(24 * 40, 16 * 32, 24 * 40)),
            (DOT, "b", (1, 6, 24), 0.0),
            (DOT, "b", (1, 6, 24), 0.0),
            (DOT, "b", (1, 6, 24), 0.0),
            (DOT, "b", (1, 4, 6, 6), 0.0),
            (DOT, "b", (1, 4, 6, 6), 0.0),
            (DOT, "b", (1, 6, 24), 0.0),
            (DOT, "b", (1, 6, 40), 0.0),
            (DOT, "b", (1, 6, 24), 0.0),
        ],
        partners=[[(i, i) for i in range(8)], [(i, i + 8) for i in range(8)]],
        why_solo={
            (1, 6, 24): NO_PARTNER,
            (1, 6, 40): NO_PARTNER,
            (1, 4, 6, 6): NO_PARTNER,
        },
    ),
    # The inputs of all steps to four gates, 6 -> 4 H; one loop, H -> 4 H each turn,
    # its first output the state; the head, H -> 4.
    Pair(
        "lstms",
        lambda: [recurrent("a", 8), recurrent("b", 12)],
        [
            (DOT, "ab", (1, 5, 48), wasted(6 * 48, 6 * 32, 6 * 48)),
            (SCAN, "ab", (1, 12), wasted(12 * 48, 8 * 32, 12 * 48)),
            (DOT, "ab", (1, 4), wasted(12 * 4, 8 * 4, 12 * 4)),
        ],
        partners=[[(0, 0), (1, 1), (2, 2)]],
    ),
    # 64 -> 256 -> 128 -> 10, and a head that reads 2x2x32 values: 128 -> 10, too.
    Pair(
        "mlp_and_cnn",
        lambda: [perceptron("a", 256, 128), convolutional("b", 16, 32)],
        [
            (CONV, "b", (1, 8, 8, 16), 0.0),
            (CONV, "b", (1, 4, 4, 32), 0.0),
            (DOT, "a", (1, 256), 0.0),
            (DOT, "a", (1, 128), 0.0),
            (DOT, "ab", (1, 10), 0.0),
        ],
        partners=[[(2, 2)]],
        why_solo={
            (1, 8, 8, 16): "no other job has one",
            (1, 4, 4, 32): "no other job has one",
            (1, 256): NO_PARTNER,
            (1, 128): NO_PARTNER,
        },
    ),
]
over_pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)


def partners_of(plan):
    """Return the places of two species' ops among their own, for shared launches."""
    places = [
        [i for i, op in enumerate(one.trace.ops) if op.is_heavy] for one in plan.species
    ]
    shared = [dict(node.members) for node in plan.nodes if len(node.members) == 2]
    return [
        (places[0].index(ops[0]), places[1].index(ops[1]))
        for ops in shared
        if ops[0] in places[0]
    ]


@over_pairs
def test_the_plan_is_the_one_derived_by_hand(pair):
    plan = plan_of(*pair.make_jobs())
    assert sorted(rows_of(plan)) == sorted(pair.launches)
    assert partners_of(plan) in pair.partners


@over_pairs
def test_the_plan_counts_its_launches_and_says_why_some_are_solo(pair):
    plan = plan_of(*pair.make_jobs())
    assert plan.num_launches == len(pair.launches)
    assert plan.num_launches_alone == sum(len(jobs) for _, jobs, *_ in pair.launches)
    assert plan.num_solo == sum(len(jobs) == 1 for _, jobs, *_ in pair.launches)
    assert {x.shape: x.why_solo for x in plan.launches if x.why_solo} == pair.why_solo
    assert all(bool(x.why_solo) == (len(x.jobs) == 1) for x in plan.launches)


@over_pairs
def test_a_plan_depends_on_neither_the_call_nor_the_names(pair):
    plan, again = (plan_of(*pair.make_jobs()) for _ in range(2))
    assert again.to_dict() == plan.to_dict()
    assert again.nodes == plan.nodes
    names = {"a": "zebra", "b": "ant"}
    renamed = plan_of(
        *(dataclasses.replace(j, name=names[j.name]) for j in pair.make_jobs())
    )
    assert renamed.nodes == plan.nodes and renamed.apart == plan.apart
    assert renamed.launches == tuple(
        dataclasses.replace(x, jobs=tuple(names[n] for n in x.jobs))
        for x in plan.launches
    )


def mlps(**options):
    return plan_of(*PAIRS[0].make_jobs(), **options)


TOO_WASTEFUL = "cheaper apart, or beyond max_waste"
APART_A = [(DOT, "a", (1, 64), 0.0), (DOT, "a", (1, 10), 0.0)]
APART_B = [(DOT, "b", (1, 32), 0.0), (DOT, "b", (1, 10), 0.0)]


@pytest.mark.parametrize(
    "max_waste, expected",
    [
        (
            0,
            [(DOT, "a", (1, 128), 0.0), (DOT, "b", (1, 96), 0.0), *APART_A, *APART_B],
        ),
        (0.25, [(DOT, "ab", (1, 128), 0.14), *APART_A, *APART_B]),
        (None, PAIRS[0].launches),
    ],
)
def test_no_launch_wastes_more_than_max_waste(max_waste, expected):
    # The three layers would waste 0.14, 0.45 and 0.33, other pairs of them 0.65 up.
    plan = mlps(max_waste=max_waste)
    assert sorted(rows_of(plan)) == sorted(expected)
    reasons = {x.why_solo for x in plan.launches if len(x.jobs) == 1}
    assert reasons == (set() if max_waste is None else {TOO_WASTEFUL})


def test_a_plan_prints_its_launches_and_totals():
    # Values of a: 64 x 128 + 128 + 128 x 64 + 64 + 64 x 10 + 10 = 17,226; of b 9,674.
    assert str(mlps()).split("\n") == [
        "#  launch       jobs     shape  waste  lowering",
        "0  dot_general  2: a, b  1x128  0.14   native",
        "1  dot_general  2: a, b  1x64   0.45   native",
        "2  dot_general  2: a, b  1x10   0.33   native",
        "2 jobs of 2 species: 6 heavy launches alone, 3 fused, 0 of them solo; "
        "waste 0.28",
        "parameters: 0.108 MB alone, 0.138 MB fused",
    ]


def test_a_plan_prints_why_launches_are_solo():
    plan = plan_of(*PAIRS[5].make_jobs())
    head, *lines = str(plan).split("\n")
    columns = ["#", "launch", "jobs", "shape", "waste", "lowering", "why solo"]
    assert re.split(r"  +", head) == columns
    cells = [re.split(r"  +", line) for line in lines[:5]]
    conv = [CONV, "1: b", "1x8x8x16", "0.00", "native", "no other job has one"]
    assert conv in [row[1:] for row in cells]
    dot = [DOT, "1: a", "1x256", "0.00", "native", NO_PARTNER]
    assert dot in [row[1:] for row in cells]
    assert cells[4][1:] == [DOT, "2: a, b", "1x10", "0.00", "native"]
    for primitive, why, count in plan.apart:
        assert f"light ops apart: {count} {primitive} ({why})" in lines
    assert len(lines) == 5 + len(plan.apart) + 2


@over_pairs
def test_a_plan_as_plain_numbers_holds_what_its_table_shows(pair):
    plan = plan_of(*pair.make_jobs())
    shown = plan.to_dict()
    assert json.loads(json.dumps(shown)) == shown
    assert shown["jobs"] == ["a", "b"] and shown["species"] == [["a"], ["b"]]
    assert shown["cost"] == dataclasses.asdict(H200)
    totals = "num_launches num_launches_alone num_solo waste"
    for name in (*totals.split(), "param_bytes", "param_bytes_alone"):
        assert shown[name] == getattr(plan, name)
    for held, launch in zip(shown["launches"], plan.launches, strict=True):
        assert held["jobs"] == list(launch.jobs)
        assert held["shape"] == list(launch.shape)
        for name in ("primitive", "waste", "lowering", "why_solo"):
            assert held[name] == getattr(launch, name)
    assert shown["apart"] == [list(row) for row in plan.apart]


def all_shared(plan, name):
    return all(len(x.jobs) > 1 for x in plan.launches if name in x.jobs)


def test_a_deeper_resnet_runs_all_of_the_shallower_one_and_wastes_nothing():
    # 18 layers: a stem, 8 blocks of two, 3 shortcuts, a head; 34: 16 blocks.
    image = spec(224, 224, 3)
    configs = {"a": resnet.RESNET18, "b": resnet.RESNET34}
    plan = plan_of(*(job(name, resnet, c, image) for name, c in configs.items()))
    assert plan.num_launches_alone == (1 + 16 + 3 + 1) + (1 + 32 + 3 + 1) == 58
    assert plan.num_launches == 37 and plan.num_solo == 37 - 21
    assert all_shared(plan, "a")
    assert {x.waste for x in plan.launches} == {0.0}
    assert plan.param_bytes == plan.param_bytes_alone


def test_a_deeper_encoder_runs_all_of_the_shallower_one():
    plan = plan_of(encoder("a", 2, 32, 2, 48), encoder("b", 3, 24, 4, 40))
    assert all_shared(plan, "a")
    assert (plan.num_launches, plan.num_launches_alone) == (3 * 8, 5 * 8)


def test_heads_of_encoders_of_two_depths_are_shared():
    head = {"pooling": "first", "num_classes": 3}
    small = encoder("a", 2, 32, 2, 48, **head)
    plan = plan_of(small, encoder("b", 3, 24, 4, 40, **head))
    assert all_shared(plan, "a") and plan.num_launches == 3 * 8 + 2
    assert partners_of(plan)[-2:] == [(16, 24), (17, 25)]


def test_two_lstms_share_all_they_do():
    plan = plan_of(recurrent("a", 8), recurrent("b", 12))
    assert all_shared(plan, "a") and all_shared(plan, "b")
    assert plan.num_solo == 0 and plan.apart == ()


def test_jobs_of_two_dtypes_share_nothing():
    config, half = mlp.Config(widths=(16,)), jnp.bfloat16
    wide = job("a", mlp, config, IMAGE)
    plan = plan_of(wide, job("b", mlp, config, spec(8, 8, dtype=half), dtype=half))
    assert plan.num_solo == plan.num_launches == plan.num_launches_alone == 4
    assert {x.why_solo for x in plan.launches} == {"forms differ"}
    assert all(len(node.members) == 1 for node in plan.nodes)


def attend(params, x):
    """Two layers of an encoder in few ops, so that many are soon traced."""
    for query, key, value, up, down in params:
        scores = jax.nn.softmax((x @ query) @ (x @ key).swapaxes(-1, -2))
        x = x + scores @ (x @ value)
        x = x + jnp.tanh(x @ up) @ down
    return x


def attentive(i):
    """Return an encoder of a width and an inner width like no other ``i``'s."""
    width, inner = 8 + i, 16 + 3 * i
    sizes = [(width, width)] * 3 + [(width, inner), (inner, width)]
    layer = [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]
    return stfuse.Job(f"job{i}", attend, [layer] * 2, spec(6, width))


def test_comparisons_grow_with_the_number_of_species(monkeypatch):
    saved, pairs = _merge._saved_s, []
    counted = lambda *xs: pairs.extend(xs[2]) or saved(*xs)  # noqa: E731
    monkeypatch.setattr(_merge, "_saved_s", counted)
    jobs = [attentive(i) for i in range(16)]
    counts = []
    for n in (8, 16):
        pairs.clear()
        names = [job.name for job in jobs[:n]]
        plan = _align.align(names, list(map(_trace.trace, jobs[:n])), H200)
        assert len(plan.species) == n and plan.num_launches == 2 * 7
        counts.append(len(pairs))
    # The first species is compared with none: 15 to 7.
    assert counts[1] <= 2.6 * counts[0]
