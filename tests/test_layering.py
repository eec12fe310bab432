"""The house: who may import whom, and how large a room may be."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "stfuse"
# In import order: a file imports only files above it.
ORDER = (
    "_errors _types _turns _options _tree _lengths _flax _job _inputs "
    "_fingerprint _program "
    "_trace _hoist _cost _rules _plan _draft _merge _align _lower _regions _values "
    "_together _evaluate _layout _bank _part _step _stacked _cache _tuned _fuse "
    "_metrics metrics _waiting _queues _buckets _shares _admission _company "
    "_scheduler _arrivals _simulate _stragglers _device _lane _staging _memory "
    "_answers _flight _books _health _canary _faults _residency _members _server "
    "_regroup _siblings _newcomers _builder _swap _supervise _engine __init__ testing"
).split()
# One entry may be a folder: its files, in their own order.
FOLDERS = {
    "_rules": "_base _moves _contract _elementwise _index _reduce _shape __init__",
    "_lower": "_store _measure _tiles _conv _conv_kernel _dot _indexed _scan __init__",
    "_regions": "_axes _record _build _grow _arithmetic _block _kernel __init__",
}
ROOMS = [(room, stem) for room, stems in FOLDERS.items() for stem in stems.split()]
SOURCES = sorted(
    path
    for room in ("stfuse", "models", "examples")
    for path in (ROOT / room).rglob("*.py")
)
JAX_FREE = (
    "_errors _types _turns _options _metrics metrics _waiting _queues _buckets "
    "_shares _admission _company _scheduler _health _stragglers".split()
)


def imports(path):
    """Return the names of all modules that a file imports, in its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module)
    return found


def files_of(entry):
    """Return the files of an entry of the order: one, or a folder's."""
    folder = PACKAGE / entry
    return (
        sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{entry}.py"]
    )


def imported_from(path, package, names):
    """Return which files of a package a file imports."""
    prefix = f"{package}."
    found = {n.removeprefix(prefix) for n in imports(path) if n.startswith(prefix)}
    return {name.split(".")[0] for name in found} & set(names)


def own_imports(entry):
    """Return the entries of the package that one of them imports."""
    found = set()
    for path in files_of(entry):
        found |= imported_from(path, "stfuse", ORDER)
    return found - {entry} if (PACKAGE / entry).is_dir() else found


def entries(folder):
    """Return the files of a folder, and the folders that have files."""
    folders = {path.parent.name for path in folder.glob("*/*.py")}
    return sorted({path.stem for path in folder.glob("*.py")} | folders)


def test_every_file_of_the_package_has_its_place_in_the_order():
    assert sorted(ORDER) == entries(PACKAGE)
    for room, stems in FOLDERS.items():
        assert sorted(stems.split()) == entries(PACKAGE / room)


@pytest.mark.parametrize(("room", "stem"), ROOMS)
def test_a_file_in_a_folder_imports_only_those_above_it(room, stem):
    stems = FOLDERS[room].split()
    found = imported_from(PACKAGE / room / f"{stem}.py", f"stfuse.{room}", stems)
    above = set(stems[: stems.index(stem)])
    assert found <= above, f"{stem} imports {found - above}"


@pytest.mark.parametrize("stem", ORDER)
def test_a_file_imports_only_files_above_it(stem):
    above = set(ORDER[: ORDER.index(stem)])
    assert own_imports(stem) <= above, f"{stem} imports {own_imports(stem) - above}"


@pytest.mark.parametrize("stem", JAX_FREE)
def test_the_scheduler_and_what_it_rests_on_know_no_jax(stem):
    assert not {name.split(".")[0] for name in imports(PACKAGE / f"{stem}.py")} & {
        "jax",
        "jaxlib",
        "numpy",
        "flax",
    }
    assert own_imports(stem) <= set(JAX_FREE)


def test_only_the_engine_starts_threads():
    starts = re.compile(r"threading\.Thread\(")
    found = {p.name for p in PACKAGE.rglob("*.py") if starts.search(p.read_text())}
    assert found == {"_engine.py"}


def test_only_the_tracing_files_know_jaxprs():
    knows = {p.stem for p in PACKAGE.rglob("*.py") if "jax.extend" in p.read_text()}
    assert knows == {"_fingerprint", "_trace"}


def test_models_never_import_the_package():
    for path in (ROOT / "models").glob("*.py"):
        assert not any(name.split(".")[0] == "stfuse" for name in imports(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_file_is_small_and_so_are_its_functions(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                assert body[-1].end_lineno - body[0].lineno < 40, node.name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.name
)
def test_a_test_file_is_small_too(path):
    assert len(path.read_text().splitlines()) <= 400


def test_nothing_reaches_for_private_or_unsafe_modules():
    banned = ("pickle", "dill", "cloudpickle", "jax._src")
    for path in SOURCES:
        assert not any(name.startswith(banned) for name in imports(path)), path
