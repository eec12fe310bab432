"""What a job and a request may be, and what is said of those that may not."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import stfuse
from tests import cases
from tests.cases import BY_NAME


def linear(params, x):
    return x @ params["w"]


GOOD = {
    "name": "job",
    "apply_fn": linear,
    "params": {"w": np.ones((3, 2), "f")},
    "example": np.ones((4, 3), "f"),
}

# What is wrong: arguments that differ from GOOD, and what the message must say.
WRONG_JOBS = {
    "empty name": ({"name": ""}, "name must be"),
    "name with a space": ({"name": "a b"}, "name must be"),
    "name of 65": ({"name": "a" * 65}, "name must be"),
    "name with a newline": ({"name": "a\n"}, "name must be"),
    "name of bytes": ({"name": b"a"}, "name must be"),
    "no function": ({"apply_fn": None}, "apply_fn is a NoneType; pass a function"),
    "weight zero": ({"weight": 0}, "weight is 0; pass a positive number"),
    "weight nan": ({"weight": float("nan")}, "weight is nan"),
    "weight text": ({"weight": "1"}, "weight is '1'"),
    "slo negative": ({"slo_s": -1.0}, "slo_s is -1.0; pass seconds > 0"),
    "slo infinite": ({"slo_s": float("inf")}, "slo_s is inf"),
    "params of text": ({"params": {"w": "abc"}}, "params leaf 'w' is a str"),
    "params of objects": (
        {"params": {"w": np.array([None, 1])}},
        "params leaf 'w' is a ndarray; pass an array",
    ),
    "params of dates": (
        {"params": {"w": np.zeros(2, "M8[s]")}},
        "params leaf 'w' is a ndarray",
    ),
    "params of records": (
        {"params": {"w": np.zeros(2, [("x", "f4")])}},
        "params leaf 'w' is a ndarray",
    ),
    "params in a foreign byte order": (
        {"params": {"w": np.ones((3, 2), ">f4")}},
        "params leaf 'w' is >f4; pass native byte order",
    ),
    "params beyond JAX's integers": (
        {"params": {"w": 2**40}},
        "params leaf 'w' is a int of too many bits",
    ),
    "example in a foreign byte order": (
        {"example": np.ones((1, 3), ">f4")},
        "example leaf '' is >f4",
    ),
    "example of a function": ({"example": len}, "example leaf '' is a builtin"),
    "example without arrays": ({"example": {}}, "use batched=False"),
    "example without rows": (
        {"example": {"x": np.float32(1)}},
        "example leaf 'x' is float32[]; every leaf needs the same leading row axis",
    ),
    "example of unequal rows": (
        {"example": {"x": np.ones((2, 3), "f"), "y": np.ones((3, 3), "f")}},
        "example leaf 'y' is float32[3,3]",
    ),
    "example of typed keys": (
        {"example": jax.random.key(0)[None]},
        "typed PRNG key; pass jax.random.key_data(key)",
    ),
    "params of another shape": (
        {"params": {"w": np.ones((4, 2), "f")}},
        "apply_fn does not trace on inputs: float32[3] (one row): TypeError",
    ),
    "params without the leaf": ({"params": {}}, "KeyError: 'w'"),
    "function that looks at values": (
        {"apply_fn": lambda p, x: x if x.sum() > 0 else -x},
        "apply_fn does not trace",
    ),
    "function that raises": (
        {"apply_fn": lambda p, x: 1 // 0},
        "ZeroDivisionError",
    ),
    "output without rows": (
        {"apply_fn": lambda p, x: {"y": x, "sum": x.sum()}},
        "output leaf 'sum' is float32[] for one row",
    ),
    "output of other rows": (
        {"apply_fn": lambda p, x: jnp.concatenate([x, x])},
        "output leaf '' is float32[2,3] for one row of inputs",
    ),
    "output of text": (
        {"apply_fn": lambda p, x: "y"},
        "output leaf '' is str for one row",
    ),
    "output of text, unbatched": (
        {"apply_fn": lambda p, x: "y", "batched": False},
        "apply_fn does not trace",
    ),
}


@pytest.mark.parametrize("wrong, said", WRONG_JOBS.values(), ids=WRONG_JOBS)
def test_a_wrong_job_is_refused_in_words(wrong, said):
    arguments = {**GOOD, **wrong}
    with pytest.raises(stfuse.JobError) as caught:
        stfuse.Job(**arguments)
    assert said in str(caught.value)
    assert caught.value.jobs == (str(arguments["name"]),)
    assert isinstance(caught.value, ValueError)


def test_a_job_cannot_be_built_of_traced_params():
    with pytest.raises(stfuse.JobError, match="leaf 'w' is traced; build jobs outside"):
        jax.jit(lambda w: stfuse.Job(**{**GOOD, "params": {"w": w}}))(np.ones((3, 2)))


def test_a_good_job_keeps_what_it_was_given_and_knows_one_row():
    job = stfuse.Job(**GOOD, slo_s=0.1, weight=2)
    assert (job.name, job.slo_s, job.weight, job.batched) == ("job", 0.1, 2, True)
    assert job.params is GOOD["params"]
    assert (job.row.shape, job.row.dtype) == ((3,), np.float32)
    assert (job.outputs.shape, job.outputs.dtype) == ((2,), np.float32)


def test_replace_changes_a_jobs_options_only():
    job = stfuse.Job(**GOOD)
    other = dataclasses.replace(job, slo_s=0.5)
    assert other.slo_s == 0.5 and other.jaxpr is job.jaxpr
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.slo_s = 1.0


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_only_shape_and_dtype_of_the_example_count(rows):
    real = stfuse.Job(**{**GOOD, "example": np.full((rows, 3), np.nan, "f")})
    spec = jax.ShapeDtypeStruct((rows, 3), np.float32)
    assert stfuse.Job(**{**GOOD, "example": spec}).jaxpr is real.jaxpr


def test_a_function_that_jax_cannot_hash_is_a_job_all_the_same():
    class Apply:
        __hash__ = None

        def __call__(self, params, x):
            return x @ params["w"]

    job = stfuse.Job(**{**GOOD, "apply_fn": Apply()})
    fused = stfuse.fuse([job], cost="cpu")
    outs = fused(fused.pack(), {"job": np.ones((1, 3), "f")})
    np.testing.assert_array_equal(outs["job"], [[3, 3]])


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_an_adapters_function_is_the_models_own(name):
    case = BY_NAME[name]
    job, x = cases.job(case, 0), case.inputs(3, 4)
    if name == "nnx":
        expected = cases.nnx_model(0)(x)
    else:
        module, variables = case.make(0)
        expected = module.apply(variables, x, train=False)
    np.testing.assert_allclose(job.apply_fn(job.params, x), expected, rtol=1e-6)


def test_later_changes_to_an_nnx_model_do_not_reach_its_job():
    model = cases.Nnx(5)
    model.eval()
    x = BY_NAME["nnx"].inputs(3, 2)
    job = stfuse.Job.from_nnx("a", model, x)
    expected = np.asarray(model(x))
    model.dense.kernel.set_value(jnp.zeros((4, 3)))
    model.train()
    fused = stfuse.fuse([job], cost="cpu")
    np.testing.assert_allclose(fused(fused.pack(), {"a": x})["a"], expected, rtol=1e-6)


# Requests.


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


# Fusing and packing.

WRONG_FUSES = {
    "no jobs": (lambda job: stfuse.fuse([]), stfuse.JobError, "found no jobs"),
    "no job": (lambda job: stfuse.fuse([job, 3]), stfuse.JobError, "found a int"),
    "twice": (lambda job: stfuse.fuse([job, job]), stfuse.JobError, "['job'] twice"),
    "waste": (
        lambda job: stfuse.fuse([job], max_waste=-1),
        ValueError,
        "max_waste is -1; pass a number >= 0",
    ),
    "lowering": (
        lambda job: stfuse.fuse([job], lowering="fast"),
        ValueError,
        "lowering is 'fast'; pass one of",
    ),
    "cost": (
        lambda job: stfuse.fuse([job], cost="tpu"),
        ValueError,
        "cost is 'tpu'; pass one of 'auto', 'h200', 'cpu'",
    ),
}


@pytest.mark.parametrize("call, error, said", WRONG_FUSES.values(), ids=WRONG_FUSES)
def test_a_wrong_fuse_is_refused_in_words(call, error, said):
    with pytest.raises(error) as caught:
        call(stfuse.Job(**GOOD))
    assert said in str(caught.value)


WRONG_PARAMS = {
    "missing leaf": ({}, "leaf 'w' is missing"),
    "extra leaf": ({**GOOD["params"], "b": 1.0}, "leaf 'b' is not expected"),
    "another shape": (
        {"w": np.ones((2, 3), "f")},
        "leaf 'w' is float32[2,3]; expected float32[3,2]",
    ),
    "another dtype": (
        {"w": np.ones((3, 2), "i4")},
        "leaf 'w' is int32[3,2]; expected float32[3,2]",
    ),
    "text": ({"w": "abc"}, "leaf 'w' is a str; expected float32[3,2]"),
    "too large a number": ({"w": 2**70}, "leaf 'w' is a int of too many bits"),
    "a spec": (
        {"w": jax.ShapeDtypeStruct((3, 2), np.float32)},
        "leaf 'w' is only a shape",
    ),
    "another container": ([np.ones((3, 2), "f")], "params do not fit"),
    "none": (None, "params do not fit"),
}


@pytest.mark.parametrize("params, said", WRONG_PARAMS.values(), ids=WRONG_PARAMS)
def test_wrong_params_are_refused_by_pack_and_swap(params, said):
    fused = stfuse.fuse([stfuse.Job(**GOOD)], cost="cpu")
    bank = fused.pack()
    for call in (
        lambda: fused.swap(bank, "job", params),
        lambda: fused.pack({"job": params}),
    ):
        with pytest.raises(stfuse.JobError) as caught:
            call()
        assert said in str(caught.value)
        assert caught.value.jobs == ("job",)


def test_unknown_names_are_refused_by_pack_and_swap():
    fused = stfuse.fuse([stfuse.Job(**GOOD)], cost="cpu")
    bank = fused.pack()
    with pytest.raises(stfuse.JobError, match="found job 'other'; it has job"):
        fused.swap(bank, "other", GOOD["params"])
    with pytest.raises(stfuse.JobError, match="found job 'other'; it has job"):
        fused.pack({"other": GOOD["params"]})
