"""The public names, their docstrings, and the examples in them."""

import dataclasses
import doctest
import importlib
import inspect
import pathlib

import pytest

import stfuse
import stfuse.metrics
import stfuse.testing

FILES = sorted(p.stem for p in pathlib.Path(stfuse.__file__).parent.glob("*.py"))
CONTRACT = {
    "Job": "name apply_fn params example slo_s weight batched pinned pad_values",
    "Job.from_linen": "name module variables example apply_kwargs",
    "Job.from_nnx": "name model example",
    "fuse": "jobs max_waste lowering cost",
    "Fused.pack": "self params",
    "Fused.__call__": "self bank inputs",
    "Fused.swap": "self bank name new_params",
    "Fused.stack": "self inputs",
    "Fused.step": "self bank stacked",
    "Fused.split": "self stacked",
    "Engine": "policy max_batch_size batch_sizes max_slots max_queue_delay_s "
    "max_queue_size max_queue_rows max_queue_bytes max_total_rows max_total_bytes "
    "strict_shares max_device_bytes switch_interval_s device clock",
    "Engine.add": "self job",
    "Engine.remove": "self name",
    "Engine.swap": "self name params",
    "Engine.submit": "self name inputs deadline_s",
    "Engine.infer": "self name inputs timeout_s",
    "Engine.infer_async": "self name inputs timeout_s",
    "Engine.stats": "self",
    "Engine.health": "self timeout_s",
    "Engine.close": "self drain timeout_s",
}


def public():
    """Return every public callable with the name a user knows it by."""
    found = {}
    for module, prefix in (
        (stfuse, ""),
        (stfuse.metrics, "metrics."),
        (stfuse.testing, "testing."),
    ):
        for name in module.__all__:
            thing = getattr(module, name)
            found[prefix + name] = thing
            if inspect.isclass(thing) and not issubclass(thing, Exception):
                for key, member in vars(thing).items():
                    if not key.startswith("_") and callable(getattr(thing, key)):
                        found[f"{prefix}{name}.{key}"] = getattr(thing, key)
                    elif isinstance(member, property):
                        found[f"{prefix}{name}.{key}"] = member.fget
    return found


@pytest.mark.parametrize("module", [stfuse, stfuse.testing])
def test_the_public_names_are_sorted_and_exist(module):
    assert list(module.__all__) == sorted(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)


@pytest.mark.parametrize("name", sorted(CONTRACT))
def test_the_contract_keeps_its_names(name):
    thing = stfuse
    for part in name.split("."):
        thing = getattr(thing, part)
    found = [p for p in inspect.signature(thing).parameters if p != "_"]
    assert found == CONTRACT[name].split()


@pytest.mark.parametrize("name", sorted(public()))
def test_a_docstring_names_arguments_results_and_errors(name):
    thing = public()[name]
    text = inspect.getdoc(thing) or ""
    assert text.split("\n")[0].endswith((".", ":")), "one summary sentence"
    if inspect.isclass(thing):
        if issubclass(thing, Exception):
            return
        fields = (
            [f.name for f in dataclasses.fields(thing) if f.init]
            if (dataclasses.is_dataclass(thing))
            else []
        )
        missing = [f for f in fields if f"{f}:" not in text and f != "_"]
    else:
        parameters = inspect.signature(thing).parameters
        missing = [p for p in parameters if p != "self" and f"{p}:" not in text]
        source = inspect.getsource(thing)
        if "-> None" not in source.split('"""')[0] and "Args:" in text:
            assert "Returns:" in text
        if "raise " in source:
            assert "Raises:" in text
    assert not missing


@pytest.mark.parametrize("stem", FILES)
def test_doctests_run(stem):
    name = "stfuse" if stem == "__init__" else f"stfuse.{stem}"
    result = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert not result.failed


def test_the_main_entry_points_have_a_runnable_example():
    for thing in (stfuse.Job, stfuse.fuse, stfuse.Engine, stfuse.testing):
        assert ">>>" in inspect.getdoc(thing)


def test_every_error_says_which_jobs_it_is_about():
    for name in stfuse.__all__:
        thing = getattr(stfuse, name)
        if inspect.isclass(thing) and issubclass(thing, Exception):
            error = thing("text", jobs=("a",))
            assert isinstance(error, stfuse.StfuseError)
            assert (str(error), error.jobs) == ("text", ("a",))
