"""Who may write to a folder of checkpoints: one run at a time.

The run holds a lock of the kernel on a file in the folder, which ends with the process, however it ends. File systems
that several hosts share may give such locks to each host separately, or not at all. So the file also says who holds it,
and its time is set every few seconds: a run on another host counts as dead only when that has stopped. Readers need no
lock.
"""

import fcntl
import json
import os
import secrets
import socket
import stat
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from meshpipe.checkpoint.errors import CheckpointError
from meshpipe.documents import DamagedFileError, is_count, parse_json

LOCK = "writer.lock"
BEAT_SECONDS = 2.0
DEAD_SECONDS = 15.0
"""Without a beat for so long, a run on another host is dead."""
_NOTE_BYTES = 4096
_TRIES = 5
"""A look at the lock holds it for an instant, which must not be taken for a run."""


class FolderInUseError(CheckpointError):
    """Another run writes to the folder; the message says which."""


class WriterLock:
    """The right of this process to write to a folder; several checkpointers of a process share it."""

    _all: ClassVar[dict[str, "WriterLock"]] = {}
    _guard = threading.RLock()

    def __init__(self, folder: Path) -> None:
        """Takes the lock; use `acquire`."""
        self._path = folder / LOCK
        self._token = secrets.token_hex(8)
        self._users = 0
        self._writing: set[int] = set()
        self.tidying = threading.Lock()
        """Held while anything but the step being written is removed from the folder."""
        self._descriptor = _take(self._path, folder, self._token)
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="checkpoint lock", daemon=True).start()

    @classmethod
    def acquire(cls, folder: Path) -> "WriterLock":
        """The lock of a folder, which must be there. Raises `FolderInUseError` when another process has it; `OSError`
        where no file can be written.
        """
        with cls._guard:
            name = os.path.realpath(folder)
            held = cls._all.get(name)
            if held is not None and not held.is_held():  # somebody has removed it, or the folder
                held._end()
                held = None
            if held is None:
                held = cls._all[name] = cls(folder)
            held._users += 1
            return held

    def release(self) -> None:
        """Gives it back, once for each `acquire`; the last one removes the file."""
        with self._guard:
            self._users -= 1
            if not self._users:
                if self.is_held():
                    with suppress(OSError):
                        self._path.unlink()
                self._end()

    def is_held(self) -> bool:
        """Whether it still is this process's: not removed, nor taken by a run that found no sign of life for long."""
        try:
            status = os.stat(self._path, follow_symlinks=False)
            ours = os.fstat(self._descriptor)
            return (status.st_dev, status.st_ino) == (ours.st_dev, ours.st_ino) and (
                _read_note(self._descriptor).get("token") == self._token
            )
        except OSError:
            return False

    def begin(self, step: int) -> bool:
        """Notes that a step is being written; False when another checkpointer of this process does so already."""
        with self._guard:
            if step in self._writing:
                return False
            self._writing.add(step)
            return True

    def is_writing(self, step: int) -> bool:
        return step in self._writing

    def end(self, step: int) -> None:
        self._writing.discard(step)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._guard, suppress(OSError):
                os.utime(self._descriptor)

    def _end(self) -> None:
        self._ended.set()
        for name, held in list(self._all.items()):
            if held is self:
                del self._all[name]
        self.forget()

    def forget(self) -> None:
        """Lets go of the file in this process alone."""
        descriptor, self._descriptor = self._descriptor, -1
        with suppress(OSError):
            os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raises `FolderInUseError` when another process of this host, or of a file system with common locks, writes to the
    folder; changes nothing.
    """
    if os.path.realpath(folder) in WriterLock._all:
        return
    try:
        descriptor = _open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return  # there is none, or none that can be read: whoever takes it will see
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder, _read_note(descriptor)) from None
    except OSError:
        pass  # no locks here
    finally:
        os.close(descriptor)


def _take(path: Path, folder: Path, token: str) -> int:
    """Opens and locks the file, and writes down who has it."""
    while True:
        try:
            descriptor, made = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), True
        except FileExistsError:
            try:
                descriptor, made = _open(path, os.O_RDWR), False
            except FileNotFoundError:
                continue
        try:
            locked = _lock(descriptor, folder)
            if not _is_at(descriptor, path):  # whoever had it has just removed it
                os.close(descriptor)
                continue
            if not made:
                _check_dead(path, folder, _read_note(descriptor), locked)
            note = {"token": token, "host": socket.gethostname(), "boot": _boot(), "process": os.getpid()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(note | {"since": round(time.time())}).encode(), 0)
            return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether the file is locked; False where the file system has no locks."""
    for attempt in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt == _TRIES - 1:
                raise _in_use(folder, _read_note(descriptor)) from None
            time.sleep(0.05)
        except OSError:
            return False
    raise AssertionError


def _check_dead(path: Path, folder: Path, note: dict[str, Any], locked: bool) -> None:
    """Raises `FolderInUseError` when whoever wrote the note still gives signs of life.

    On this host the kernel's lock has told already that it is dead.
    """
    if locked and note.get("boot") == _boot():
        return
    print(
        f"meshpipe: {folder} was in use by {_owner(note)}; waiting {DEAD_SECONDS:.0f} s for a sign of life.",
        file=sys.stderr,
        flush=True,
    )
    first = _time_of(path)
    end = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 4)
        if _time_of(path) != first:
            raise _in_use(folder, note)


def _time_of(path: Path) -> tuple[int, int] | None:
    """When the file was last touched; opened anew, since network file systems remember the times of files."""
    try:
        descriptor = _open(path, os.O_RDONLY)
    except OSError:
        return None
    status = os.fstat(descriptor)
    os.close(descriptor)
    return status.st_mtime_ns, status.st_ino


def _open(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _read_note(descriptor: int) -> dict[str, Any]:
    """What the file says of its owner; nothing where it is not as it should be."""
    try:
        note = parse_json(os.pread(descriptor, _NOTE_BYTES, 0))
    except (OSError, DamagedFileError):
        return {}
    return note if isinstance(note, dict) else {}


def _in_use(folder: Path, note: dict[str, Any]) -> FolderInUseError:
    return FolderInUseError(
        f"One run at a time may save to a folder. {folder} is in use by {_owner(note)}. "
        "Wait for that run to end, stop it, or name another folder."
    )


def _owner(note: dict[str, Any]) -> str:
    host, process, since = note.get("host"), note.get("process"), note.get("since")
    if not (isinstance(host, str) and host.isprintable() and is_count(process) and is_count(since, 1 << 40)):
        return "a run that has not said who it is"
    assert isinstance(since, int)
    return f"process {process} on {host:.100}, since {datetime.fromtimestamp(since).isoformat(' ', 'seconds')}"


def _boot() -> str:
    """A name of this start of this machine, the same in all of its containers."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _forget_in_child() -> None:
    """A forked child must neither hold the lock when its parent has died nor believe that it is its own."""
    for held in WriterLock._all.values():
        held.forget()
    WriterLock._all.clear()


os.register_at_fork(after_in_child=_forget_in_child)
