"""Every example runs at its smallest size; the README's code runs as it is printed."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMALLEST = {
    "bench_lowering": ["--smoke", "--jobs=2", "--repeats=1"],
    "quickstart": [],
    "serve_tenants": ["--smoke"],
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


def test_the_demo_runs_checks_its_answers_and_draws(tmp_path):
    result = run(
        "-m", "examples.serve_tenants", *SMALLEST["serve_tenants"], f"--out={tmp_path}"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("exclusive", "time", "space-time", "fused answers equal", "largest"):
        assert word in result.stdout
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000


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
