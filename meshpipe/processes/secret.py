"""The secret of a run: what its processes sign with it, and the names that nobody else can guess."""

import hashlib
import hmac
import json
import os
import stat
from functools import cached_property
from pathlib import Path

from meshpipe.errors import ArgumentError

VARIABLE = "MESHPIPE_SECRET"
"""The environment variable that holds the secret; `launch` makes a new one for each start of its processes."""
LEAST_CHARACTERS = 32
MOST_CHARACTERS = 4096


class IntrusionError(ConnectionError):
    """Somebody without the run's secret wrote a value or opened a connection of the run; nothing of it was used."""


class Secret:
    """Signs texts and derives names. The empty key gives no protection: everybody knows it."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __bool__(self) -> bool:
        return bool(self._key)

    def mac(self, *parts: object) -> bytes:
        """The HMAC-SHA256 of some parts, which cannot run into each other."""
        return hmac.digest(self._key, json.dumps([str(part) for part in parts]).encode(), "sha256")

    def name(self, text: str) -> str:
        """A name in place of `text`, the same in all processes of the run."""
        return self.mac("name", text)[:16].hex()

    def number(self, text: str, *integers: int) -> int:
        """A number below 2^64 in place of a name and some integers; takes about a microsecond."""
        data = b"".join(value.to_bytes(8, "big") for value in integers) + text.encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._number_key).digest(), "big")

    @cached_property
    def _number_key(self) -> bytes:
        return self.mac("numbers")

    def sign(self, key: str, sender: int, text: str) -> str:
        """The text with its signature, which holds for this key and this sending process alone."""
        return f"{self.mac('value', key, sender, text).hex()} {sender} {text}"

    def check(self, key: str, signed: str) -> str:
        """The text of a signed value. Raises `IntrusionError` when it was not signed for this key with this secret."""
        mac, _, rest = signed.partition(" ")
        sender, _, text = rest.partition(" ")
        if not hmac.compare_digest(mac.encode(), self.mac("value", key, sender, text).hex().encode()):
            raise IntrusionError(
                f"someone without the run's secret wrote {key} into the key-value store of the run. The value was not "
                "used. Keep others out of the run's network, and give all of its processes the same secret."
            )
        return text

    def derive(self, *parts: str) -> "Secret":
        """Another secret, for one purpose or one run, from which this one cannot be found."""
        return Secret(self.mac("derive", *parts) if self._key else b"")


def read_secret_file(path: str) -> Secret:
    """The secret in a file. Raises `ArgumentError` when it is too short, or others can read or replace it."""
    file = Path(path).expanduser()
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
            status = os.fstat(opened.fileno())
            text = opened.read(MOST_CHARACTERS + 1).strip() if stat.S_ISREG(status.st_mode) else None
    except OSError as error:
        raise ArgumentError(
            f"`secret_file` must be a file that can be read. Got {path!r}: {error.strerror}. Write one by "
            f"(umask 077; openssl rand -hex 32 > {path})."
        ) from error
    if text is None:
        raise ArgumentError(f"`secret_file` must be a regular file. Got {path!r}. Name another file.")
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o077:
        raise ArgumentError(
            "`secret_file` must belong to this user, and nobody else may read or write it. "
            f"Got {path!r} with mode {stat.S_IMODE(status.st_mode):03o} and owner {status.st_uid}. "
            f"Run chmod 600 {path}, and write a new secret into it if others may have read this one."
        )
    return _of_text(text, "`secret_file`")


def _of_text(text: bytes, source: str) -> Secret:
    if not LEAST_CHARACTERS <= len(text) <= MOST_CHARACTERS:
        raise ArgumentError(
            f"{source} must hold {LEAST_CHARACTERS} to {MOST_CHARACTERS} characters. Got {len(text)}. "
            "Make one by openssl rand -hex 32."
        )
    return Secret(hashlib.sha256(text).digest())


def environment_secret() -> Secret:
    """The secret in the environment, from which it is taken out, so that no other program inherits it.

    Empty where there is none. Raises `ArgumentError` when it is too short.
    """
    text = os.environ.pop(VARIABLE, None)
    return Secret(b"") if text is None else _of_text(text.strip().encode(), VARIABLE)


def use(secret: Secret) -> None:
    """Has everything that this process writes and reads signed with this secret."""
    _current[:] = [secret]


def current() -> Secret:
    """The secret in use: that of the environment until `use` was called."""
    if not _current:
        use(environment_secret())
    return _current[0]


_current: list[Secret] = []
