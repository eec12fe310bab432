"""What a job may be, and what is said of one that may not."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from tests import cases, functions
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
    "weight huge": (
        {"weight": 1e308},
        "weight is 1e+308; pass a positive",
    ),
    "weight nan": ({"weight": float("nan")}, "weight is nan"),
    "weight text": ({"weight": "1"}, "weight is '1'"),
    "pinned, a number": ({"pinned": 1}, "pinned is 1; pass True or False"),
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
        expected = functions.nnx_model(0)(x)
    else:
        module, variables = case.make(0)
        expected = module.apply(variables, x, train=False)
    np.testing.assert_allclose(job.apply_fn(job.params, x), expected, rtol=1e-6)


def test_later_changes_to_an_nnx_model_do_not_reach_its_job():
    model = functions.Nnx(5)
    model.eval()
    x = BY_NAME["nnx"].inputs(3, 2)
    job = stfuse.Job.from_nnx("a", model, x)
    expected = np.asarray(model(x))
    model.dense.kernel.set_value(jnp.zeros((4, 3)))
    model.train()
    fused = stfuse.fuse([job], cost="cpu")
    np.testing.assert_allclose(fused(fused.pack(), {"a": x})["a"], expected, rtol=1e-6)


class Configured(functions.Nnx):
    """A model with an attribute that cannot be hashed."""

    def __init__(self, seed, cfg):
        super().__init__(seed)
        self.cfg = cfg


@pytest.mark.parametrize("cfg", [{"act": "relu"}, {1, 2}, slice(1, 2)], ids=repr)
def test_an_nnx_model_may_have_attributes_that_cannot_be_hashed(cfg):
    model = Configured(5, cfg)
    model.eval()
    x = BY_NAME["nnx"].inputs(3, 2)
    fused = stfuse.fuse([stfuse.Job.from_nnx("a", model, x)], cost="cpu")
    np.testing.assert_allclose(fused(fused.pack(), {"a": x})["a"], model(x), rtol=1e-6)


@pytest.mark.parametrize(
    "model, said",
    [
        (3, "found a int; pass a `flax.nnx.Module`, built"),
        ("model", "found a str"),
        (linear, "found a function"),
        (functions.Nnx, "found a class Nnx"),
        (nn.Dense(3), "found a Dense"),
    ],
)
def test_what_is_no_nnx_model_is_refused_in_words(model, said):
    with pytest.raises(stfuse.JobError) as caught:
        stfuse.Job.from_nnx("a", model, np.ones((1, 4), "f"))
    assert said in str(caught.value)
    assert caught.value.jobs == ("a",)


# Fusing and packing.

WRONG_FUSES = {
    "no jobs": (lambda job: stfuse.fuse([]), stfuse.JobError, "found no jobs"),
    "nothing": (
        lambda job: stfuse.fuse(None),
        stfuse.JobError,
        "found a NoneType; pass a list",
    ),
    "a job": (
        lambda job: stfuse.fuse(job),
        stfuse.JobError,
        "found a Job; pass a list",
    ),
    "waste of text": (
        lambda job: stfuse.fuse([job], max_waste="a"),
        ValueError,
        "max_waste is 'a'; pass a number >= 0",
    ),
    "a list of costs": (
        lambda job: stfuse.fuse([job], cost=["cpu"]),
        ValueError,
        "cost is ['cpu']; pass one of",
    ),
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
