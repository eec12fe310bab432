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


def pytest_configure(config):
    if config.getoption("--slow"):
        hypothesis.settings.load_profile("slow")


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
