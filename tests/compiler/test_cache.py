"""The compile cache: which folders are accepted, and which files are read."""

import os
import stat

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


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"`compile_cache` must be a writable folder. Got '.*file"):
            CompileCache(path)


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_new_files_are_private_to_this_user(tmp_path, open_umask):
    CompileCache(tmp_path / "new" / "cache").write("key", Serialised(b"program", (0,)))
    (file,) = (tmp_path / "new" / "cache").iterdir()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path, mode):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ValueError, match=rf"which others may write to \(mode {mode:04o}\).*chmod go-w"):
        CompileCache(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="others may write to"):
        CompileCache(tmp_path / "link")


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(tmp_path / "cache", 12345, 12345)
    else:
        monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        CompileCache(tmp_path / "cache")


def written(folder):
    """The file of a program that may be read."""
    CompileCache(folder).write("key", Serialised(b"program", (0,)))
    (file,) = folder.iterdir()
    assert CompileCache(folder).read("key") is not None
    return file


def test_a_file_writable_by_others_is_not_read_with_one_warning(tmp_path, capsys):
    written(tmp_path / "cache").chmod(0o666)
    cache = CompileCache(tmp_path / "cache")
    assert cache.read("key") is None
    assert cache.read("key") is None
    error = capsys.readouterr().err
    assert error.count("others may write to (mode 0666)") == 1
    cache.write("key", Serialised(b"program", (0,)))  # which takes its place
    assert cache.read("key") is not None


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_other_kinds_of_files_are_not_read(tmp_path, kind):
    file = written(tmp_path / "cache")
    moved = file.rename(tmp_path / "elsewhere")
    {"link": lambda: file.symlink_to(moved), "fifo": lambda: os.mkfifo(file), "folder": file.mkdir}[kind]()
    assert CompileCache(tmp_path / "cache").read("key") is None


def test_a_replaced_folder_is_not_read(tmp_path):
    """A user with write access to the parent folder can put another folder in its place."""
    file = written(tmp_path / "cache")
    cache = CompileCache(tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "before")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / file.name).write_bytes(b"something else")
    assert cache.read("key") == Serialised(b"program", (0,))


def test_a_removed_folder_is_harmless(tmp_path):
    cache = CompileCache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    cache.write("key", Serialised(b"program", (0,)))
    assert cache.read("key") is None
