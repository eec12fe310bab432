"""Equal keys mean equal programs; what changes an answer changes the key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import stfuse
from stfuse import _trace
from stfuse._fingerprint import Key, canonical
from tests import cases
from tests.cases import CASES


def key(apply_fn, params=1.0, example=((1, 3), "f"), **options):
    if isinstance(example, tuple):
        example = jax.ShapeDtypeStruct(*example)
    return _trace.trace(stfuse.Job("job", apply_fn, params, example, **options)).key


def built(number):
    """Return a function made anew: no object is shared with another call's."""
    w = jnp.full((3, 3), float(number))

    def body(carry, _):
        return jax.nn.relu(jnp.tanh(carry @ w)), carry.sum()

    @jax.jit
    def inner(x):
        return lax.cond(x.sum() > 0, jnp.sin, lambda y: y * 2, x)

    def apply_fn(p, x):
        y, sums = lax.scan(body, x * p, None, length=3)
        return inner(y) + sums.sum()

    return apply_fn


def test_a_function_built_twice_is_one_program():
    assert key(built(1)) == key(built(1))
    assert hash(key(built(1))) == hash(key(built(1)))


def test_closed_over_values_do_not_change_the_program():
    assert key(built(1)) == key(built(2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jobs_of_one_kind_are_one_program_and_of_two_kinds_are_two(case):
    kinds = [_trace.trace(cases.job(other, 0)).key for other in CASES]
    mine = _trace.trace(case.job("again")).key
    assert [k == mine for k in kinds] == [other is case for other in CASES]


def test_an_array_in_a_call_inside_a_loop_is_part_of_the_program():
    def make(number):
        @jax.jit
        def inner(x):
            return x + np.full(3, number, "f")

        return lambda p, x: lax.scan(
            lambda c, _: (inner(c), None), x * p, None, length=2
        )[0]

    assert key(make(1)) == key(make(1))
    assert key(make(1)) != key(make(2))


SCALES = {"2.0": 2.0, "2": 2, "3.0": 3.0, "-2.0": -2.0, "0.0": 0.0, "-0.0": -0.0}
SCALES |= {"nan": np.nan, "numpy": np.float32(2), "jax": jnp.float32(2)}


def test_a_literal_that_differs_in_value_or_sign_is_another_program():
    keys = {n: key(lambda p, x, s=s: x * p + s) for n, s in SCALES.items()}
    again = {n: key(lambda p, x, s=s: x * p + s) for n, s in SCALES.items()}
    assert keys == again  # NaN, too
    values = ("2.0", "3.0", "-2.0", "0.0", "-0.0", "nan")
    assert len({keys[n] for n in values}) == len(values)


def test_a_literal_that_differs_in_type_is_another_program():
    example = ((1, 3), "i4")
    adders = [lambda p, x: x + 1, lambda p, x: x + 1.0, lambda p, x: x + True]
    assert len({key(f, 1, example) for f in adders}) == 2  # True is 1 to integers


CHANGES = {
    "as it is": lambda p, x: jnp.sum(x * p, -1),
    "another primitive": lambda p, x: jnp.max(x * p, -1),
    "another order of operands": lambda p, x: jnp.sum(p * x, -1),
    "another axis kept": lambda p, x: jnp.sum(x * p, -1, keepdims=True),
    "one more op": lambda p, x: jnp.sum(jnp.sin(x * p), -1),
    "another dtype inside": lambda p, x: jnp.sum((x * p).astype("f2"), -1).astype("f4"),
    "another output": lambda p, x: (jnp.sum(x * p, -1), x),
    "swapped outputs": lambda p, x: (x, jnp.sum(x * p, -1)),
    "a power": lambda p, x: jnp.sum((x * p) ** 2, -1),
    "another power": lambda p, x: jnp.sum((x * p) ** 3, -1),
    "a scan": lambda p, x: lax.scan(lambda c, _: (c * p, None), x, None, length=2)[0],
    "a longer scan": lambda p, x: lax.scan(
        lambda c, _: (c * p, None), x, None, length=3
    )[0],
    "another body": lambda p, x: lax.scan(
        lambda c, _: (c + p, None), x, None, length=2
    )[0],
    "a reversed scan": lambda p, x: lax.scan(
        lambda c, _: (c * p, None), x, None, length=2, reverse=True
    )[0],
    "a literal in a body": lambda p, x: lax.scan(
        lambda c, _: (c * 2, None), x, None, length=2
    )[0],
    "another literal in a body": lambda p, x: lax.scan(
        lambda c, _: (c * 3, None), x, None, length=2
    )[0],
}


def test_every_change_of_the_program_changes_the_key():
    keys = {name: key(f) for name, f in CHANGES.items()}
    assert len(set(keys.values())) == len(CHANGES)


def test_shapes_and_dtypes_of_inputs_and_params_are_part_of_the_key():
    def apply_fn(p, x):
        return x * p

    examples = [((1, 3), "f"), ((1, 4), "f"), ((1, 3), "i4"), ((1, 3, 1), "f")]
    params = [1.0, 1, np.ones(1, "f"), np.ones(1, "f2")]
    keys = {key(apply_fn, p, e) for p in params for e in examples}
    assert len(keys) == len(params) * len(examples)
    assert key(apply_fn, 1.0, ((9, 3), "f")) == key(apply_fn, 1.0, ((1, 3), "f"))


def test_matmul_precision_is_part_of_the_key():
    dot = functools.partial(lambda p, x: x @ p)
    p = np.ones((3, 3), "f")
    highest = key(dot, p)
    with jax.default_matmul_precision("bfloat16"):
        assert key(dot, p) != highest
    assert key(dot, p) == highest


def test_where_a_value_lives_is_not_part_of_the_key():
    mesh = jax.make_mesh(
        (1,),
        ("x",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:1],
    )
    places = [None, jax.P("x"), jax.P()]

    def make(place):
        def apply_fn(p, x):
            if place is None:
                return x * p
            placed = jax.NamedSharding(mesh, place)
            return jax.lax.with_sharding_constraint(x * p, placed)

        return apply_fn

    nowhere, rows, everywhere = [key(make(place)) for place in places]
    assert rows == everywhere != nowhere


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (np.float32(1), np.float64(1)),
        (np.zeros(2, "f"), np.zeros(2, "i4")),
        (np.zeros((2, 1)), np.zeros((1, 2))),
        (np.float32(0.0), np.float32(-0.0)),
        ((1, 2), [1, 2]),
        ({"a": 1}, {"b": 1}),
        (object(), object()),
    ],
    ids=lambda x: type(x).__name__ if type(x) is object else str(x),
)
def test_what_python_may_call_equal_is_kept_apart(one, other):
    assert Key(canonical(one)) == Key(canonical(one))
    assert Key(canonical(one)) != Key(canonical(other))


def test_a_parameter_that_cannot_be_hashed_equals_only_itself():
    one, other = bytearray(b"a"), bytearray(b"a")
    assert one == other
    assert Key(canonical((one,))) == Key(canonical((one,)))
    assert Key(canonical((one,))) != Key(canonical((other,)))


def test_a_key_is_no_other_things_equal():
    assert Key(1) != 1 and Key(1) == Key(1)
