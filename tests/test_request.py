"""What a request may be, and what is said of one that may not."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import stfuse
from tests import cases


def echo(params, inputs):
    return jax.tree.map(lambda x: x, inputs)


EXAMPLE = {
    "f": np.ones((2, 3), np.float32),
    "i": np.ones((2,), np.int8),
    "b": (np.ones((2, 1), bool), np.ones((2, 1), ml_dtypes.bfloat16)),
}
ECHO = stfuse.fuse([stfuse.Job("echo", echo, {}, EXAMPLE)], cost="cpu")
PLAIN = stfuse.fuse(
    [stfuse.Job("plain", echo, {}, {"x": np.ones((2, 2), "f")}, batched=False)],
    cost="cpu",
)


def changed(**leaves):
    return {"echo": {**EXAMPLE, **leaves}}


# What is wrong: the requests, and what the message must say.
WRONG_REQUESTS = {
    "nothing": ({}, "inputs is empty; pass {name: inputs}"),
    "no mapping": ([1, 2], "inputs is a list; pass {name: inputs}"),
    "an array": (np.ones((2, 3)), "inputs is a ndarray"),
    "unknown job": ({"other": EXAMPLE}, "found job 'other'; it has echo"),
    "missing leaf": (
        {"echo": {"f": EXAMPLE["f"], "i": EXAMPLE["i"]}},
        "leaf 'b/0' is missing",
    ),
    "extra leaf": (changed(z=1), "leaf 'z' is not expected"),
    "another container": (changed(b=list(EXAMPLE["b"])), "inputs do not fit"),
    "no tree": ({"echo": 3}, "inputs do not fit"),
    "none": (changed(f=None), "leaf 'f' is a NoneType; expected float32 array"),
    "text": (changed(f="abc"), "leaf 'f' is a str"),
    "bytes": (changed(f=b"abc"), "leaf 'f' is a bytes"),
    "text in a list": (changed(f=[["1", "2", "3"]]), "leaf 'f' is a list"),
    "a function": (changed(f=len), "leaf 'f' is a builtin"),
    "a spec": (changed(f=jax.ShapeDtypeStruct((2, 3), np.float32)), "leaf 'f'"),
    "another width": (
        changed(f=np.ones((2, 4), "f")),
        "leaf 'f' is float32[2,4]; expected [B,3]",
    ),
    "too few axes": (changed(f=np.ones(3, "f")), "is float32[3]; expected [B,3]"),
    "too many axes": (changed(f=np.ones((2, 3, 1), "f")), "expected [B,3]"),
    "a number for rows": (changed(i=3), "leaf 'i' is int8[]; expected [B]"),
    "wider dtype": (
        changed(f=np.ones((2, 3), "f8")),
        "leaf 'f' has dtype <f8; expected float32",
    ),
    "narrower dtype": (changed(f=np.ones((2, 3), "f2")), "has dtype <f2"),
    "dtype of another kind": (changed(i=np.ones(2, bool)), "has dtype |b1"),
    "unsigned dtype": (changed(i=np.ones(2, "u1")), "has dtype |u1"),
    "foreign byte order": (
        changed(f=np.ones((2, 3), ">f4")),
        "leaf 'f' has dtype >f4; expected float32 (native)",
    ),
    "jax array of another dtype": (changed(f=jnp.ones((2, 3), int)), "has dtype <i4"),
    "typed keys": (
        changed(i=jax.random.split(jax.random.key(0), 2)),
        "leaf 'i' has dtype key<fry>; expected int8",
    ),
    "dates": (changed(i=np.zeros(2, "M8[s]")), "leaf 'i' has dtype <M8[s]"),
    "records": (changed(i=np.zeros(2, [("x", "f4")])), "leaf 'i' has dtype"),
    "objects": (changed(f=np.array([[1, 2, None]] * 2)), "has dtype |O"),
    "no rows": (
        {"echo": jax.tree.map(lambda x: x[:0], EXAMPLE)},
        "has no rows; expected at least one",
    ),
    "rows that differ": (
        changed(f=np.ones((3, 3), "f")),
        "leaf 'f' has 3 rows; the first leaf has 2",
    ),
    "floats for integers": (changed(i=[1.5, 2.0]), "float64 does not convert to int8"),
    "integers for bools": (changed(b=([[1], [0]], EXAMPLE["b"][1])), "leaf 'b/0'"),
    "complex for floats": (changed(f=[[1j, 2, 3]] * 2), "complex128 does not convert"),
    "overflowing integer": (changed(i=[1, 300]), "300 out of bounds for int8"),
    "huge integer": (changed(i=[1, 2**80]), "leaf 'i' is a list"),
    "ragged list": (changed(f=[[1, 2, 3], [1, 2]]), "inhomogeneous"),
    "list with a none": (changed(f=[[1, 2, None]] * 2), "leaf 'f' is a list"),
    "a set": (changed(i={1, 2}), "leaf 'i' is a set"),
}


@pytest.mark.parametrize("request_, said", WRONG_REQUESTS.values(), ids=WRONG_REQUESTS)
def test_a_wrong_request_is_refused_in_words(request_, said):
    with pytest.raises(stfuse.RequestError) as caught:
        ECHO(ECHO.pack(), request_)
    assert said in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_wrong_request_names_its_job():
    with pytest.raises(stfuse.RequestError) as caught:
        ECHO.stack(changed(f=None))
    assert caught.value.jobs == ("echo",)


def test_a_request_of_an_unbatched_job_must_have_its_shape():
    with pytest.raises(
        stfuse.RequestError, match=r"float32\[1,2,2\]; expected \[2,2\]"
    ):
        PLAIN.stack({"plain": {"x": np.ones((1, 2, 2), "f")}})


FLOATS = np.arange(6, dtype="f").reshape(2, 3)
READ_ONLY = FLOATS.copy()
READ_ONLY.flags.writeable = False
# What may be passed: a leaf of the request, and what it means.
ACCEPTED = {
    "lists": ({"f": FLOATS.tolist()}, FLOATS),
    "lists of integers": ({"f": [[0, 1, 2], [3, 4, 5]]}, FLOATS),
    "lists of bools": ({"f": [[False, True, False]] * 2}, [[0, 1, 0]] * 2),
    "lists of arrays": ({"f": list(FLOATS)}, FLOATS),
    "nested tuples": ({"f": tuple(map(tuple, FLOATS.tolist()))}, FLOATS),
    "every other column": ({"f": np.repeat(FLOATS, 2, 1)[:, ::2]}, FLOATS),
    "reversed": ({"f": FLOATS[::-1, ::-1][::-1, ::-1]}, FLOATS),
    "column major": ({"f": np.asfortranarray(FLOATS)}, FLOATS),
    "broadcast": ({"f": np.broadcast_to(FLOATS[:1], (2, 3))}, FLOATS[[0, 0]]),
    "read-only": ({"f": READ_ONLY}, FLOATS),
    "unaligned": (
        {
            "f": np.frombuffer(b"_" + FLOATS.tobytes(), "u1")[1:]
            .view("f4")
            .reshape(2, 3)
        },
        FLOATS,
    ),
    "a jax array": ({"f": jnp.asarray(FLOATS)}, FLOATS),
    "nan and infinity": (
        {"f": [[float("nan"), float("inf"), -0.0]] * 2},
        [[np.nan, np.inf, -0.0]] * 2,
    ),
    "integers at the limits": ({"i": [-128, 127]}, [-128, 127]),
}


@pytest.mark.parametrize("leaves, meant", ACCEPTED.values(), ids=ACCEPTED)
def test_a_request_may_hold(leaves, meant):
    (path,) = leaves
    answer = ECHO(ECHO.pack(), changed(**leaves))["echo"]
    expected = np.asarray(meant, EXAMPLE[path].dtype)
    cases.assert_bitwise(answer, {**EXAMPLE, path: expected})


def test_numbers_may_stand_for_scalars_of_an_unbatched_job():
    example = {"f": np.float32(0), "i": 1, "b": np.bool_(0)}
    job = stfuse.Job("scalars", echo, {}, example, batched=False)
    fused = stfuse.fuse([job], cost="cpu")
    answer = fused(fused.pack(), {"scalars": {"f": 2, "i": 3, "b": True}})["scalars"]
    cases.assert_bitwise(
        answer, {"f": np.float32(2), "i": np.int32(3), "b": np.bool_(1)}
    )


def test_wide_dtypes_that_jax_narrows_are_accepted_as_declared_and_as_narrowed():
    job = stfuse.Job("wide", echo, {}, np.ones((1, 2)))  # float64
    fused = stfuse.fuse([job], cost="cpu")
    for x in (np.ones((2, 2)), np.ones((2, 2), "f")):
        answer = fused(fused.pack(), {"wide": x})["wide"]
        cases.assert_bitwise(answer, np.ones((2, 2), "f"))
