"""Twenty and more kinds of wrong job and wrong request, beside a tenant that serves."""

import jax
import numpy as np
import pytest

import stfuse
from stfuse.testing import FakeDevice, ManualClock, affine_job

ROW = np.ones((1, 3), np.float32)
X = {"x": ROW, "ids": np.zeros((1, 2), np.int32)}


def apply_fn(params, x):
    return x["x"] * params["w"] + x["ids"].sum(-1, keepdims=True)


PARAMS = {"w": np.ones(3, np.float32)}
DELETED = jax.numpy.ones((1, 3))
DELETED.delete()


class Unreadable:
    """An object that says it is an array, and fails to be one."""

    def __array__(self, dtype=None, copy=None):
        raise ZeroDivisionError("division by zero")


# what is wrong: (arguments of Job, a piece of the message)
WRONG_JOBS = {
    "empty name": (("", apply_fn, PARAMS, X), "name"),
    "name with a slash": (("a/b", apply_fn, PARAMS, X), "A-Z a-z 0-9"),
    "name too long": (("a" * 65, apply_fn, PARAMS, X), "1 to 64"),
    "name is a number": ((7, apply_fn, PARAMS, X), "name"),
    "no function": (("a", "model", PARAMS, X), "apply_fn is a str"),
    "text among the params": (("a", apply_fn, {"w": "big"}, X), "leaf 'w' is a str"),
    "objects in an array": (
        ("a", apply_fn, {"w": np.array([None])}, X),
        "leaf 'w' is a ndarray",
    ),
    "no rows in the example": (("a", apply_fn, PARAMS, np.float32(1)), "row axis"),
    "rows that differ": (
        ("a", apply_fn, PARAMS, {"x": ROW, "ids": np.zeros((2, 2), np.int32)}),
        "same leading row axis",
    ),
    "no inputs at all": (("a", apply_fn, PARAMS, ()), "batched=False"),
    "a typed key as example": (
        ("a", lambda p, k: k, PARAMS, jax.random.split(jax.random.key(0), 1)),
        "key_data",
    ),
    "a function that fails": (
        ("a", lambda p, x: p["missing"], PARAMS, X),
        "KeyError: 'missing'",
    ),
    "shapes that do not fit": (
        ("a", apply_fn, {"w": np.ones(4, np.float32)}, X),
        "does not trace",
    ),
    "a branch on a value": (
        ("a", lambda p, x: x["x"] if x["x"].sum() > 0 else -x["x"], PARAMS, X),
        "TracerBoolConversionError",
    ),
    "outputs without rows": (
        ("a", lambda p, x: {"loss": x["x"].mean()}, PARAMS, X),
        "output leaf 'loss'",
    ),
}

WRONG_OPTIONS = {
    "a weight of zero": ({"weight": 0.0}, "weight is 0.0"),
    "a weight that is no number": ({"weight": float("nan")}, "weight is nan"),
    "a negative SLO": ({"slo_s": -1.0}, "slo_s is -1.0"),
}

# what is wrong: (name, inputs, options, error, a piece of the message)
WRONG_REQUESTS = {
    "unknown job": ("nobody", X, {}, stfuse.RequestError, "'nobody'"),
    "missing leaf": ("job", {"x": ROW}, {}, stfuse.RequestError, "'ids' is missing"),
    "extra leaf": ("job", {**X, "y": ROW}, {}, stfuse.RequestError, "'y'"),
    "not a tree": ("job", ROW, {}, stfuse.RequestError, "do not fit"),
    "nothing": ("job", None, {}, stfuse.RequestError, "do not fit"),
    "wrong width": (
        "job",
        {**X, "x": np.ones((1, 4), np.float32)},
        {},
        stfuse.RequestError,
        r"'x' is float32\[1,4\]; expected \[B,3\]",
    ),
    "wrong rank": (
        "job",
        {**X, "x": np.ones(3, np.float32)},
        {},
        stfuse.RequestError,
        r"expected \[B,3\]",
    ),
    "wrong dtype": (
        "job",
        {**X, "x": ROW.astype(np.float64)},
        {},
        stfuse.RequestError,
        "expected float32",
    ),
    "foreign byte order": (
        "job",
        {**X, "x": ROW.astype(">f4")},
        {},
        stfuse.RequestError,
        ">f4",
    ),
    "no rows": (
        "job",
        {"x": ROW[:0], "ids": np.zeros((0, 2), np.int32)},
        {},
        stfuse.RequestError,
        "no rows",
    ),
    "rows that differ": (
        "job",
        {**X, "x": np.ones((2, 3), np.float32)},
        {},
        stfuse.RequestError,
        "rows",
    ),
    "too many rows": (
        "job",
        {"x": np.ones((5, 3), np.float32), "ids": np.zeros((5, 2), np.int32)},
        {},
        stfuse.RequestError,
        "found 5 rows; expected at most max_batch_size = 4",
    ),
    "fractions as ids": (
        "job",
        {**X, "ids": [[0.5, 1.0]]},
        {},
        stfuse.RequestError,
        "'ids' is a list",
    ),
    "a number too large": (
        "job",
        {**X, "ids": [[2**40, 0]]},
        {},
        stfuse.RequestError,
        "'ids' is a list",
    ),
    "a ragged list": (
        "job",
        {**X, "x": [[1.0, 2.0], [3.0]]},
        {},
        stfuse.RequestError,
        "'x' is a list",
    ),
    "text": ("job", {**X, "x": "abc"}, {}, stfuse.RequestError, "'x' is a str"),
    "a deleted array": (
        "job",
        {**X, "x": DELETED},
        {},
        stfuse.RequestError,
        "'x' is a deleted array",
    ),
    "keys that do not sort": (
        "job",
        {"u": ROW, 1: ROW},
        {},
        stfuse.RequestError,
        "do not fit",
    ),
    "an object that fails": (
        "job",
        {**X, "x": Unreadable()},
        {},
        stfuse.RequestError,
        r"'x' is a Unreadable; expected float32 array \(division by zero\)",
    ),
    "a deadline of many digits": (
        "job",
        X,
        {"deadline_s": 10**5000},
        stfuse.RequestError,
        "too many digits",
    ),
    "a deadline in the past": (
        "job",
        X,
        {"deadline_s": -1.0},
        stfuse.DeadlineError,
        "deadline",
    ),
    "a deadline that is text": (
        "job",
        X,
        {"deadline_s": "soon"},
        stfuse.RequestError,
        "'soon'",
    ),
    "a deadline that is no number": (
        "job",
        X,
        {"deadline_s": float("nan")},
        stfuse.RequestError,
        "nan",
    ),
}


@pytest.fixture(scope="module")
def engine():
    clock = ManualClock()  # nobody is slow: lanes change, and compile, for nobody
    device = FakeDevice(clock)
    with stfuse.Engine(max_batch_size=4, device=device, clock=clock) as engine:
        jobs = (stfuse.Job("job", apply_fn, PARAMS, X), affine_job("neighbor"))
        for ready in [engine.add(job) for job in jobs]:
            ready.result(60)
        yield engine


@pytest.fixture(autouse=True)
def neighbors_notice_nothing(engine):
    """After every wrong thing, both tenants answer as before, and nothing waits."""
    before = engine.stats()
    yield
    np.testing.assert_array_equal(engine.infer("neighbor", ROW), ROW * 3)
    np.testing.assert_array_equal(engine.infer("job", X), ROW)
    after = engine.stats()
    assert after.queued == 0
    assert set(after.tenants) == {"job", "neighbor"}
    for name in after.tenants:
        assert after.tenants[name].served == before.tenants[name].served + 1
        assert after.tenants[name].failed == 0
    assert after.compiles == before.compiles


@pytest.mark.parametrize("what", WRONG_JOBS)
def test_a_wrong_job_says_what_is_wrong(what):
    arguments, text = WRONG_JOBS[what]
    with pytest.raises(stfuse.JobError) as caught:
        stfuse.Job(*arguments)
    assert text in str(caught.value)
    assert caught.value.jobs == (str(arguments[0]),)


@pytest.mark.parametrize("what", WRONG_OPTIONS)
def test_a_wrong_option_of_a_job_says_what_is_wrong(what):
    options, text = WRONG_OPTIONS[what]
    with pytest.raises(stfuse.JobError) as caught:
        stfuse.Job("a", apply_fn, PARAMS, X, **options)
    assert text in str(caught.value)


def test_wrong_additions_and_swaps_say_what_is_wrong(engine):
    spec = {"w": jax.ShapeDtypeStruct((3,), np.float32)}
    for call, text in (
        (lambda: engine.add("job"), "found a str"),
        (lambda: engine.add(affine_job("job")), "here already"),
        (lambda: engine.add(stfuse.Job("spec", apply_fn, spec, X)), "only a shape"),
        (lambda: engine.remove("nobody"), "'nobody'"),
        (lambda: engine.swap("nobody", PARAMS), "'nobody'"),
        (lambda: engine.swap("job", {}), "leaf 'w' is missing"),
        (lambda: engine.swap("job", {"w": np.ones(4, "f")}), "float32[4]"),
        (lambda: engine.swap("job", {"w": np.ones(3, "i4")}), "int32[3]"),
        (lambda: engine.swap("job", {"w": "heavy"}), "leaf 'w' is a str"),
        (lambda: engine.swap("job", spec), "only a shape"),
    ):
        with pytest.raises(stfuse.JobError) as caught:
            call()
        assert text in str(caught.value)


@pytest.mark.parametrize("what", WRONG_REQUESTS)
def test_failure_04_a_wrong_request_says_what_is_wrong(engine, what):
    name, inputs, options, error, text = WRONG_REQUESTS[what]
    with pytest.raises(error, match=text) as caught:
        engine.submit(name, inputs, **options)
    assert caught.value.jobs == (name,)


def test_traced_inputs_are_refused(engine):
    def submit(x):
        with pytest.raises(stfuse.RequestError, match="found traced inputs"):
            engine.submit("job", {**X, "x": x})
        with pytest.raises(stfuse.RequestError, match="'x' is a list"):
            engine.submit("job", {**X, "x": [x]})
        return x

    jax.jit(submit)(ROW)


def test_names_that_cannot_be_hashed_are_refused(engine):
    with pytest.raises(stfuse.RequestError, match=r"found job '\['job'\]'"):
        engine.submit(["job"], X)
    for call in (lambda: engine.remove(["job"]), lambda: engine.swap(["job"], PARAMS)):
        with pytest.raises(stfuse.JobError, match=r"found job '\['job'\]'"):
            call()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_queue_delay_s": None}, "max_queue_delay_s is None; pass seconds"),
        ({"batch_sizes": 3}, "batch_sizes is 3; pass a list"),
        ({"clock": 3}, "clock is 3; pass a function"),
        ({"switch_interval_s": "1"}, "switch_interval_s is '1'; pass seconds"),
    ],
)
def test_a_wrong_option_of_an_engine_says_what_is_wrong(options, text):
    with pytest.raises(ValueError, match=text):
        stfuse.Engine(**options)
