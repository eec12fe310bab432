"""Plans of unlike jobs, against plans derived by hand from their architectures.

Every pair is planned for an H200, where a launch costs as much as moving 13 MB: any two
ops of these sizes that may share a launch should. Parameters are shapes only, so
nothing is computed.
"""

import collections
import dataclasses
import functools
import json

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
    """Two jobs, the launches that they should have, and how many ran if alone."""

    name: str
    make_jobs: collections.abc.Callable
    launches: list
    num_alone: int
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
        num_alone=6,
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
        num_alone=8,
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
        num_alone=7,
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
        num_alone=24,
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
        num_alone=6,
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
        num_alone=6,
        why_solo={
            (1, 8, 8, 16): "no other job has one",
            (1, 4, 4, 32): "no other job has one",
            (1, 256): NO_PARTNER,
            (1, 128): NO_PARTNER,
        },
    ),
]
over_pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)


@over_pairs
def test_the_plan_is_the_one_derived_by_hand(pair):
    plan = plan_of(*pair.make_jobs())
    rows = rows_of(plan)
    # Launches that do not wait for one another may stand in either order.
    assert sorted(rows) == sorted(pair.launches)
    assert rows[-1] == pair.launches[-1]
    for name in plan.names:
        own, expected = (
            [(primitive, shape[:1] + shape[2:]) for primitive, jobs, shape, _ in side]
            for side in (
                [row for row in rows if name in row[1]],
                [row for row in pair.launches if name in row[1]],
            )
        )
        assert [primitive for primitive, _ in own] == [p for p, _ in expected]


@over_pairs
def test_the_plan_counts_its_launches_and_says_why_some_are_solo(pair):
    plan = plan_of(*pair.make_jobs())
    assert plan.num_launches == len(pair.launches)
    assert plan.num_launches_alone == pair.num_alone
    assert plan.num_solo == sum(len(row[1]) == 1 for row in pair.launches)
    assert {x.shape: x.why_solo for x in plan.launches if x.why_solo} == pair.why_solo
    assert all(bool(x.why_solo) == (len(x.jobs) == 1) for x in plan.launches)
