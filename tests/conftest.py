"""Settings of the whole suite; nothing else is global."""

import os

import hypothesis
import jax
import pytest

from stfuse._lower import _measure

# What is measured depends on the machine, and so would what is tested: tests that are
# about measuring set their own budget and folder.
os.environ["STFUSE_MEASURE_BUDGET_S"] = "0"
os.environ["STFUSE_CACHE_DIR"] = ""

# A GPU rounds float32 products to TF32 by default: no comparison would be fair.
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
    "default", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.register_profile(
    "slow", derandomize=False, deadline=None, max_examples=400
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser):
    text = "draw 400 examples where the normal suite draws 25, at random"
    parser.addoption("--slow", action="store_true", help=text)
    text = "first seed of the tests that take one; their names say which they ran with"
    parser.addoption("--seed-offset", type=int, default=0, help=text)
    text = "run the tests that take a seed so many times, each with another one"
    parser.addoption("--runs", type=int, default=1, help=text)


def pytest_configure(config):
    if config.getoption("--slow"):
        hypothesis.settings.load_profile("slow")


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        first, runs = (metafunc.config.getoption(x) for x in ("seed_offset", "runs"))
        seeds = range(first, first + runs)
        metafunc.parametrize("seed", seeds, ids=lambda seed: f"seed={seed}")


@pytest.fixture
def machine_settings(request):
    """How long a state machine runs: 2,000 examples with ``--slow``."""
    num_examples = 2000 if request.config.getoption("--slow") else 20
    return hypothesis.settings(max_examples=num_examples, stateful_step_count=40)


@pytest.fixture
def live(tmp_path, monkeypatch):
    """Make everything worth measuring, with a disk and a budget of its own."""
    monkeypatch.setenv("STFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("STFUSE_MEASURE_BUDGET_S", "1000")
    monkeypatch.setattr(_measure, "_SMALLEST_S", {jax.default_backend(): 0.0})
    monkeypatch.setattr(_measure, "_SMALLEST_STEP_S", {jax.default_backend(): 0.0})
    _measure.forget()
    yield monkeypatch
    _measure.forget()
