"""Damage to the files of a checkpoint, each in turn."""

import zlib
from collections.abc import Iterator
from pathlib import Path

from meshpipe.checkpoint.checksums import write_list
from meshpipe.checkpoint.files import below

KINDS = ("flip", "truncate", "remove")


def damage_each_file(folder: Path, kind: str) -> Iterator[str]:
    """Yields the name of each file of the folder while one bit of it is flipped, its last byte or all of it is gone."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if kind == "remove":
            path.unlink()
        elif kind == "truncate" or not content:
            path.write_bytes(content[:-1] if content else b"x")
        else:
            flipped = bytearray(content)
            flipped[len(content) // 2] ^= 1
            path.write_bytes(flipped)
        try:
            yield path.relative_to(folder).as_posix()
        finally:
            path.write_bytes(content)


def remake_checksums(step: Path) -> None:
    """Makes the list of checksums right for the files as they are now, as whoever forges them does."""
    (step / "checksums.json").unlink(missing_ok=True)
    contents = {name: (step / name).read_bytes() for name in below(step)}
    write_list(step, {name: (len(content), zlib.crc32(content)) for name, content in contents.items()})
