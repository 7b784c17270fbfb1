"""Which files of a source are read, and which are refused."""

import gzip
from pathlib import Path

import pytest

from meshpipe.data.preparation.records import read_records
from meshpipe.data.preparation.sources import Slice, find_files

WHOLE = gzip.compress(b"some words of a text\n" * 1000, mtime=0)
DAMAGED = WHOLE[:12] + b"\xff" * 8 + WHOLE[20:]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json.gz", gzip.compress(b'[{"text": "a"}]'), r"a list. Convert it: gzip -dc a.json.gz \| jq .* > a.jsonl$"),
        ("a.json", b'[{"text": "a"}]', r"a list. Convert it: jq .* a.json > a.jsonl$"),
        ("a.jsonl", b'[{"text": "a"}]', r"a list. Convert it: jq .* a.jsonl > a.lines.jsonl$"),
        ("a.tar.gz", gzip.compress(b"name\0\0"), "has bytes of zero"),
        ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
        ("a.txt.gz", DAMAGED, "while decompressing"),
        ("b.txt.gz", gzip.compress(b""), "is empty"),
        ("a.txt.xz", b"no xz", "not supported"),
    ],
)
def test_files_that_cannot_be_read_are_refused(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        find_files([str(tmp_path / name)], "auto", "Sources", tmp_path / "to")


def test_files_that_are_damaged_further_on_are_refused_as_they_are_read(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % (number**5) for number in range(20_000))
    packed = gzip.compress(lines, mtime=0)
    path, middle = tmp_path / "a.jsonl.gz", len(packed) // 2
    path.write_bytes(packed[:middle] + b"\xff" * 64 + packed[middle + 64 :])
    (file,) = find_files([str(path)], "auto", "Sources", tmp_path / "to").files
    records = read_records(Slice(file, 0, file.size, file.size), None, 1 << 20, None, lambda share: None)
    with pytest.raises(ValueError, match=r"that can be read. Got .*a.jsonl.gz"):
        list(records)
