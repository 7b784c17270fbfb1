"""Damage to the files of a checkpoint, each in turn."""

from collections.abc import Iterator
from pathlib import Path

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
