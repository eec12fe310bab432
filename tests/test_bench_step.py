"""The benchmarks of one step run at their smallest size, and their parts do as told."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stfuse
from examples import workloads

ROOT = pathlib.Path(__file__).parents[1]
QUICK = ("--scale=small", "--calls=1", "--rounds=1")
NAMES = sorted(workloads.make_workloads(jnp.float32, is_small=True))


def run(*arguments, how="-m"):
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:stfuse", how, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def small(name, **options):
    return workloads.make_workloads(jnp.float32, is_small=True, **options)[name]


def test_the_benchmark_of_one_step_checks_prints_saves_and_draws(tmp_path):
    saved, picture = tmp_path / "times.json", tmp_path / "times.png"
    asked = ("--workloads=gemm,lstm", "--jobs=1,3", "--profile")
    files = (f"--save={saved}", f"--plot={picture}")
    result = run("examples.bench_step", *QUICK, *asked, *files)
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("latency", "pipelined", "in turn", "jit(vmap)", "native", "no GPU"):
        assert word in result.stdout
    found = json.loads(saved.read_text())["workloads"]
    assert {name: set(each) for name, each in found.items()} == {
        "gemm": {"1", "3"},
        "lstm": {"1", "3"},
    }
    record = found["gemm"]["3"]
    assert set(record["medians_us"]["latency"]) == {
        *("in turn", "jit(vmap)", "native", "auto")
    }
    assert record["flops"] == 3 * 2 * 8 * 24 * 16
    assert record["num_bytes"] == 3 * 4 * 24 * 16
    assert record["floor_us"] is None
    assert picture.stat().st_size > 10_000


def test_pytorch_is_left_out_with_a_line_where_it_cannot_run():
    asked = ("--workloads=gemm", "--jobs=2", "--rivals=native", "--torch")
    result = run("examples.bench_step", *QUICK, *asked)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("--torch: its rivals are left out") == 1
    assert "in turn " not in result.stdout


def test_the_benchmark_of_subsets_checks_prints_and_saves(tmp_path):
    saved = tmp_path / "times.json"
    cases = "--cases=gemm:6:2,minilm:4:3:5"
    result = run("examples.bench_subset", *QUICK, cases, f"--save={saved}")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = ("dense 2", "2 of 6, contiguous", "2 of 6, scattered", "all 6", "all 4")
    for word in rows:
        assert word in result.stdout
    found = json.loads(saved.read_text())["cases"]
    assert set(found) == {"gemm:6:2", "minilm:4:3:5"}
    assert set(found["gemm:6:2"]["differences"]) == set(rows[:4])


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("bench_step", ("--workloads=gemm", "--jobs=2", "--rivals=auto")),
        ("bench_subset", ("--cases=gemm:3:2",)),
    ],
)
def test_a_wrong_answer_ends_in_a_failure(name, asked):
    code = (
        f"from absl import app; from examples import {name}, workloads; "
        f"workloads.TOLERANCE['float32'] = -1; app.run({name}.main)"
    )
    result = run(code, *QUICK, *asked, how="-c")
    assert result.returncode == 1
    assert "an answer is not its model's own: gemm" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("examples.bench_step", "--workloads=vgg"), "there are resnet50"),
        (("examples.bench_step", "--jobs=2,few"), "pass numbers of models"),
        (("examples.bench_step", "--rivals=mps"), "there are in turn"),
        (("examples.bench_subset", "--cases=vgg:4:2"), "there are resnet50"),
        (("examples.bench_subset", "--cases=bert:4"), "pass workload:N:k:tokens"),
        (("examples.bench_subset", "--cases=bert:4:4"), "k must be in 1..N-1"),
    ],
)
def test_a_wrong_flag_is_refused_at_once(arguments, told):
    result = run(*arguments, *QUICK)
    assert result.returncode == 1
    assert told in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_models_differ_in_every_leaf_and_a_mix_up_would_show(name):
    jobs, inputs = workloads.make_jobs(small(name), 2, np.float32)
    for a, b in zip(*(jax.tree.leaves(job.params) for job in jobs), strict=True):
        assert not np.array_equal(a, b)
    alone = workloads.answers_alone(jobs, inputs)
    assert workloads.differences(alone, alone)[0] == 0
    swapped = dict(zip(alone, reversed(alone.values()), strict=True))
    assert workloads.differences(swapped, alone)[0] > 0.01


def test_an_answer_that_is_not_finite_differs():
    alone, nan = {"a": np.ones(2)}, {"a": np.array([1, np.nan])}
    assert workloads.differences(nan, alone) == (np.inf, "a")


def test_a_table_counts_only_the_rows_looked_up():
    workload = small("minilm", num_tokens=3)
    (params,) = workloads.make_params(workload, 1, np.float32)
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    width, vocab, positions = 16, 97, 16
    unread = 4 * width * (vocab - 3 + positions - 3)
    assert workloads.used_bytes(workload, params) == everything - unread


def test_a_loop_counts_as_often_as_it_runs():
    flops = []
    for num_tokens in (4, 8):
        workload = small("lstm", num_tokens=num_tokens)
        jobs, _ = workloads.make_jobs(workload, 1, np.float32)
        plan = stfuse.fuse(jobs, cost="cpu").plan.to_dict()
        flops.append(workloads.true_flops(plan))
    head = 2 * 8 * 4
    assert flops[1] - head == 2 * (flops[0] - head)


def test_kernels_are_counted_on_the_streams_of_a_gpu_only():
    from examples import bench_step

    def named(what, name, **where):
        return {"ph": "M", "name": what, "args": {"name": name}, **where}

    def took(name, us, **where):
        return {"ph": "X", "name": name, "dur": us, **where}

    gpu, other, cpu = ({"pid": p, "tid": t} for p, t in ((1, 1), (1, 2), (2, 1)))
    events = [
        named("process_name", "/device:GPU:0", pid=1),
        named("process_name", "/host:CPU", pid=2),
        named("thread_name", "Stream #1(Compute)", **gpu),
        named("thread_name", "XLA Ops", **other),
        named("thread_name", "Stream", **cpu),
        *(took("gemm", 2.0, **gpu), took("gemm", 3.0, **gpu), took("copy", 1.0, **gpu)),
        *(took("gemm", 50.0, **other), took("gemm", 70.0, **cpu)),
    ]
    total_us, count = bench_step.kernel_times(events)
    assert total_us == {"gemm": 5.0, "copy": 1.0}
    assert count == {"gemm": 2, "copy": 1}
