"""Files reach the disk before a step has its name, and are read past the page cache where memory and disk allow it."""

import errno
import os
import zlib
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
from saved_trees import trees

from meshpipe.checkpoint import Checkpointer, contents, files
from meshpipe.checkpoint.contents import Content, write_files
from meshpipe.checkpoint.files import read_checked
from meshpipe.checkpoint.memory import aligned_bytes
from meshpipe.documents import DamagedFileError

SIZES = [0, 1, 4095, 1 << 20, (1 << 20) + 4096, (5 << 20) + 123]


def random_bytes(size):
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def test_every_file_and_folder_is_flushed_before_a_step_has_its_name(tmp_path, monkeypatch):
    flushed, renamed = [], []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(path, target):
        there = {path, *path.rglob("*")}
        renamed.append((there, set(map(Path, flushed))))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, trees(), {})
    [(there, before)] = renamed
    assert len(there) > 20
    assert there <= before
    assert flushed[-1] == str(tmp_path)


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_FLUSHED_TOGETHER", 3)
    wanted = {f"{number % 2}/{number}": Content(bytes([number]) * number, padding=number) for number in range(8)}
    written = write_files(tmp_path, wanted)
    for number in range(8):
        expected = bytes([number]) * number + bytes(number)
        assert (tmp_path / f"{number % 2}" / f"{number}").read_bytes() == expected
        assert written[f"{number % 2}/{number}"] == (2 * number, zlib.crc32(expected))


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        write_files(tmp_path, {"a": Content(b"other"), "b": Content(b"")})
    assert (tmp_path / "a").read_text() == "mine"


@pytest.fixture(params=["direct", "not direct on this file system", "refused while reading"])
def file_system(request, monkeypatch):
    if request.param == "not direct on this file system":
        monkeypatch.setattr(files, "_set_direct", lambda descriptor, direct: False)
    elif request.param == "refused while reading":

        class Refusing(FileIO):
            def readinto(self, buffer):
                raise OSError(errno.EINVAL, "Invalid argument")

        read = files._read_directly
        monkeypatch.setattr(
            files, "_read_directly", lambda file, into: read(Refusing(file.fileno(), closefd=False), into)
        )
    return request.param


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", [0, 64])
@pytest.mark.usefixtures("file_system")
def test_what_is_read_is_what_was_written(tmp_path, size, start):
    """Into memory that begins with a page, and into other."""
    values = random_bytes(size)
    [expected] = write_files(tmp_path, {"file": Content(values.data)}).values()
    into = aligned_bytes((8 << 20) + start)[start : start + size]
    read_checked(tmp_path / "file", expected, into.data)
    np.testing.assert_array_equal(into, values)
    read_checked(tmp_path / "file", expected)
    if size:
        with pytest.raises(DamagedFileError, match="instead of"):
            read_checked(tmp_path / "file", (size + 1, expected[1]), aligned_bytes(size + 1).data)


@pytest.mark.parametrize("place", [0, 1 << 20, -1])
def test_a_changed_byte_is_found_wherever_it_is(tmp_path, place):
    values = random_bytes(SIZES[-1])
    [expected] = write_files(tmp_path, {"file": Content(values.data)}).values()
    changed = values.copy()
    changed[place] ^= 1
    (tmp_path / "file").write_bytes(changed.tobytes())
    for into in (aligned_bytes(len(values)).data, None):
        with pytest.raises(DamagedFileError, match="has changed bytes"):
            read_checked(tmp_path / "file", expected, into)


def test_large_memory_begins_with_a_huge_page_and_takes_no_more_than_asked_for():
    for size in (1, 1 << 20, 2 << 20, (3 << 20) + 5):
        memory = aligned_bytes(size)
        memory[:] = 7
        assert memory.size == size
        assert memory.ctypes.data % (64 if size < 2 << 20 else 2 << 20) == 0
