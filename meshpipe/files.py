"""Paths given by a caller: expands `~`, checks before any work that files can be written there, and writes them."""

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from meshpipe.errors import ArgumentError

NAME_MAX = 255
"""Longest file name in bytes, on all systems that JAX supports."""


def expand(name: str, path: str, *, section: str = "") -> str:
    """Expands `~` to the home folder, which shells do not do in `--flag=~/x`.

    Raises `ArgumentError`, naming the argument `name`, for an invalid or empty path and an unknown user.
    """
    if not path.strip():
        raise ArgumentError(f"`{name}` must name a file or folder. Got an empty name. Leave it out for none.", section)
    if "\0" in path:
        raise ArgumentError(f"`{name}` must name a file or folder. Got {path!r}, which is not a valid name.", section)
    if max(len(os.fsencode(part)) for part in path.split("/")) > NAME_MAX:
        raise ArgumentError(f"`{name}` must name a file or folder. Got {_shorten(path)}: File name too long.", section)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ArgumentError(f"`{name}` names the home folder of a user. Got {path!r}, and there is no {user}.", section)
    return expanded


def expanded(name: str, path: str | Path, *, section: str = "") -> Path:
    """The path with `~` expanded. Raises as `expand` does."""
    return Path(expand(name, str(path), section=section))


def expand_fields(config: Any, *names: str, section: str = "") -> None:
    """Expands these fields of a frozen dataclass, in its `__post_init__`; None stays None."""
    for name in names:
        path = getattr(config, name)
        if path is not None:
            object.__setattr__(config, name, type(path)(expand(name, str(path), section=section)))


def check_file(name: str, path: str | Path) -> None:
    """Raises `ArgumentError`, naming the argument `name`, when the file cannot be written. Changes nothing on disk."""
    path = Path(path)
    problem: OSError | None = None
    try:
        if path.is_fifo():  # to open it and close it again would end its reader
            problem = None if os.access(path, os.W_OK) else PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))  # neither creates nor truncates
    except OSError as error:
        problem = error
    if problem is None or problem.errno == errno.ENXIO:
        return
    if problem.errno == errno.EISDIR:
        raise ArgumentError(f"`{name}` must name a file. Got the folder {str(path)!r}. Name a file in it.")
    if problem.errno == errno.ENOENT:
        if not path.parent.is_dir():
            raise ArgumentError(
                f"`{name}` must name a file in a folder that exists. Got {str(path)!r}, and there is no folder "
                f"{path.parent}. Create it, or name another file."
            )
        problem = _why_nothing_can_be_made(path.parent)
    if problem is not None:
        raise ArgumentError(
            f"`{name}` must name a writable file. Got {_shorten(path)}: {problem.strerror}. Name another "
            "file, or change its permissions."
        )


def check_folder(name: str, path: str | Path) -> None:
    """Raises `ArgumentError`, naming the argument `name`, when files cannot be written to the folder. A missing folder
    is allowed, and not created.
    """
    path = Path(path).absolute()
    try:
        nearest = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
        problem = None if nearest.is_dir() or not nearest.exists() else OSError(errno.ENOTDIR, f"{nearest} is a file")
        problem = problem or _why_nothing_can_be_made(nearest)
        for part in path.relative_to(nearest).parts:  # folders to be created later
            if len(os.fsencode(part)) > os.pathconf(nearest, "PC_NAME_MAX"):
                problem = OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:  # a name that is too long, a circle of links
        problem = error
    if problem is not None:
        raise ArgumentError(
            f"`{name}` must name a writable folder. Got {_shorten(path)}: {problem.strerror}. Name another folder."
        )


@contextmanager
def writing_whole(name: str, path: Path) -> Iterator[Path]:
    """The path to write a file to, which gets its own name when it is whole.

    Pipes, devices, and files in folders where no other can be made are written directly. Raises `ArgumentError`, naming
    the argument `name`, when the file cannot be written, such as on a full disk.
    """
    target = Path(os.path.realpath(path))
    is_direct = (target.exists() and not target.is_file()) or not os.access(target.parent, os.W_OK)
    partial = target if is_direct else target.with_name(f".partial-{os.getpid()}{target.suffix}")
    try:
        yield partial
        if not is_direct:
            os.replace(partial, target)
    except OSError as error:
        raise ArgumentError(
            f"`{name}` must name a file that can be written. Got {_shorten(path)}: {error.strerror}. Make room, or "
            "name another file."
        ) from error
    finally:
        if not is_direct:
            with suppress(OSError):
                partial.unlink()


def missing_folders(path: Path) -> list[Path]:
    """The folder and those above it that are not there yet, the innermost first."""
    return [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes those of the folders that hold nothing; give the innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def read_text(path: str | Path, limit: int = 1 << 26) -> str:
    """Reads a text file. Raises `OSError` for one of more than `limit` bytes (e.g. `/dev/zero`), and
    `UnicodeDecodeError`, a `ValueError`, if it is not UTF-8 text.
    """
    with open(Path(path).expanduser(), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes")
    return content.decode()


def _why_nothing_can_be_made(folder: Path) -> OSError | None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def _shorten(path: str | Path) -> str:
    text = repr(str(path))
    return text if len(text) <= 120 else f"{text[:60]}...{text[-50:]} ({len(text) - 2} characters)"
