"""What was measured survives the process, and nothing else does harm."""

import json
import multiprocessing

import pytest

from stfuse._lower import _store


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("STFUSE_CACHE_DIR", str(path))
    return path


def test_what_is_saved_is_loaded(folder):
    assert _store.load("a") is None
    _store.save("a", {"x": 1.5, "y": 2.0})
    _store.save("b", {"x": 3.0})
    assert _store.load("a") == {"x": 1.5, "y": 2.0}
    assert _store.load("b") == {"x": 3.0}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.iterdir())) == 2  # no temporary file stays


def test_an_empty_name_turns_the_disk_off(monkeypatch):
    monkeypatch.setenv("STFUSE_CACHE_DIR", "")
    _store.save("a", {"x": 1.0})
    assert _store.folder() is None
    assert _store.load("a") is None


def test_the_users_own_cache_is_the_default(tmp_path, monkeypatch):
    monkeypatch.delenv("STFUSE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _store.folder() == tmp_path / ".cache" / "stfuse"


def broken(text):
    record = json.loads(text)
    yield "truncated", text[: len(text) // 2]
    yield "empty", ""
    yield "another version", json.dumps({**record, "version": -1})
    yield "another question", json.dumps({**record, "question": "b"})
    yield "no numbers", json.dumps({**record, "seconds": {"x": "fast"}})
    yield "no table", json.dumps({**record, "seconds": 3})
    yield "a list", "[]"
    yield "bytes", "\x00\xff"
    yield "huge", text + " " * (2 << 20)


def test_a_file_that_cannot_be_read_is_as_good_as_none(folder):
    _store.save("a", {"x": 1.0})
    (path,) = folder.iterdir()
    for what, text in broken(path.read_text()):
        path.write_text(text)
        assert _store.load("a") is None, what
        _store.save("a", {"x": 2.0})
        assert _store.load("a") == {"x": 2.0}, what


def test_a_folder_that_others_may_write_to_is_not_trusted(folder):
    _store.save("a", {"x": 1.0})
    folder.chmod(0o777)
    assert _store.load("a") is None
    _store.save("b", {"x": 1.0})
    folder.chmod(0o700)
    assert _store.load("a") == {"x": 1.0}
    assert _store.load("b") is None


def test_no_folder_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STFUSE_CACHE_DIR", str(tmp_path / "file" / "below"))
    _store.save("a", {"x": 1.0})
    assert _store.load("a") is None


def write_often(k):
    for i in range(50):
        _store.save("a", {f"way {j}": float(k) for j in range(100)})
        found = _store.load("a")
        assert found is not None and len(set(found.values())) == 1, i


def test_writers_at_the_same_time_do_not_mix(folder):
    context = multiprocessing.get_context("spawn")  # JAX has threads: no fork
    writers = [context.Process(target=write_often, args=(k,)) for k in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 3
    assert len(list(folder.iterdir())) == 1
