"""A folder that is written whole, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshpipe.checkpoint.files import flush_folder
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder, expanded


@contextmanager
def new_folder(to: str | Path) -> Iterator[Path]:
    """A folder that gets its name when all is in it, and is removed where that fails."""
    target = expanded("to", to).absolute()
    check_folder("to", target)
    if target.is_dir() and any(target.iterdir()):
        raise ArgumentError(f"`to` must be a folder that is not there or empty. Got {str(to)!r}. Name another.")
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        raise ArgumentError(f"{partial} is left of an export that was interrupted. Remove it, or name another folder.")
    partial.mkdir(parents=True)
    try:
        yield partial
        with suppress(FileNotFoundError):
            target.rmdir()
        flush_folder(partial)
        partial.rename(target)
        flush_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
