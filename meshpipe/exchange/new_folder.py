"""A folder that is written whole, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshpipe.checkpoint.files import flush_folder
from meshpipe.documents import DamagedFileError
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder, expanded, missing_folders, remove_empty


@contextmanager
def new_folder(to: str | Path) -> Iterator[Path]:
    """A folder that gets its name when all is in it, and is removed where that fails.

    Raises `ArgumentError` when it cannot be made, or has no room for what is written to it.
    """
    target = expanded("to", to).absolute()
    check_folder("to", target)
    if target.is_dir() and any(target.iterdir()):
        raise ArgumentError(f"`to` must be a folder that is not there or empty. Got {str(to)!r}. Name another.")
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        raise ArgumentError(f"{partial} is left of an export that was interrupted. Remove it, or name another folder.")
    made = missing_folders(target.parent)
    try:
        partial.mkdir(parents=True)
        yield partial
        with suppress(FileNotFoundError):
            target.rmdir()
        flush_folder(partial)
        partial.rename(target)
        flush_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        remove_empty(made)
        if not isinstance(error, OSError) or isinstance(error, DamagedFileError):
            raise
        raise ArgumentError(
            f"`to` must be a folder with room for the weights. Got {str(to)!r}: {error.strerror or error}. Make room, "
            "or name another folder."
        ) from error
