"""The folder of compiled programs: what can be a folder, and what is read from it."""

import pytest

from meshpipe.compiler.cache import CompileCache
from meshpipe.compiler.reload import Serialised


def test_what_was_written_is_read(tmp_path):
    program = Serialised(b"bytes\n of a \x00 program", (2, 3))
    CompileCache(tmp_path / "cache").write("key", program)
    cache = CompileCache(tmp_path / "cache")
    assert cache.read("key") == program
    assert cache.read("another") is None
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_other_settings_read_nothing(tmp_path, monkeypatch):
    CompileCache(tmp_path).write("key", Serialised(b"program", (0,)))
    monkeypatch.setattr("meshpipe.compiler.cache._surroundings", lambda: "another version of JAX")
    assert CompileCache(tmp_path).read("key") is None


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"`compile_cache` must be a folder that can be written to. Got '.*file"):
            CompileCache(path)


def test_a_folder_that_has_gone_costs_nothing(tmp_path):
    cache = CompileCache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    cache.write("key", Serialised(b"program", (0,)))
    assert cache.read("key") is None
