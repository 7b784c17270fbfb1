"""The secret of a run, which signs the messages of its processes and makes unguessable names."""

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
MIN_CHARACTERS = 32
MAX_CHARACTERS = 4096


class IntrusionError(ConnectionError):
    """A value or connection was not authenticated with the run's secret; it was not used."""


class Secret:
    """Signs texts and derives names. The empty key gives no protection, since everyone knows it."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __bool__(self) -> bool:
        return bool(self._key)

    def mac(self, *parts: object) -> bytes:
        """The HMAC-SHA256 of the parts, in an unambiguous encoding."""
        return hmac.digest(self._key, json.dumps([str(part) for part in parts]).encode(), "sha256")

    def name(self, text: str) -> str:
        """A name derived from `text`, the same in all processes of the run."""
        return self.mac("name", text)[:16].hex()

    def number(self, text: str, *integers: int) -> int:
        """A number below 2^64 derived from a name and integers; takes about a microsecond."""
        data = b"".join(value.to_bytes(8, "big") for value in integers) + text.encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._number_key).digest(), "big")

    @cached_property
    def _number_key(self) -> bytes:
        return self.mac("numbers")

    def sign(self, key: str, sender: int, text: str) -> str:
        """The text with its signature, which is valid only for this key and this sending process."""
        return f"{self.mac('value', key, sender, text).hex()} {sender} {text}"

    def check(self, key: str, signed: str) -> str:
        """The text of a signed value. Raises `IntrusionError` unless it was signed for this key with this secret."""
        mac, _, rest = signed.partition(" ")
        sender, _, text = rest.partition(" ")
        if not hmac.compare_digest(mac.encode(), self.mac("value", key, sender, text).hex().encode()):
            raise IntrusionError(
                f"someone without the run's secret wrote {key} into the key-value store of the run. The value was not "
                "used. Run on a private network, and give all processes the same secret."
            )
        return text

    def derive(self, *parts: str) -> "Secret":
        """Another secret, for one purpose or one run; this one cannot be recovered from it."""
        return Secret(self.mac("derive", *parts) if self._key else b"")


def read_secret_file(path: str) -> Secret:
    """The secret in a file. Raises `ArgumentError` when it is too short, or other users can read or replace it."""
    file = Path(path).expanduser()
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
            status = os.fstat(opened.fileno())
            text = opened.read(MAX_CHARACTERS + 1).strip() if stat.S_ISREG(status.st_mode) else None
    except OSError as error:
        raise ArgumentError(
            f"`secret_file` must be a readable file. Got {path!r}: {error.strerror}. Write one with "
            f"(umask 077; openssl rand -hex 32 > {path})."
        ) from error
    if text is None:
        raise ArgumentError(f"`secret_file` must be a regular file. Got {path!r}. Name another file.")
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o077:
        raise ArgumentError(
            "`secret_file` must belong to this user, and other users must not be able to read or write it. "
            f"Got {path!r} with mode {stat.S_IMODE(status.st_mode):03o} and owner {status.st_uid}. "
            f"Run chmod 600 {path}, and write a new secret if others may have read this one."
        )
    return _of_text(text, "`secret_file`")


def _of_text(text: bytes, source: str) -> Secret:
    if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        raise ArgumentError(
            f"{source} must hold {MIN_CHARACTERS} to {MAX_CHARACTERS} characters. Got {len(text)}. "
            "Make one with openssl rand -hex 32."
        )
    return Secret(hashlib.sha256(text).digest())


def environment_secret() -> Secret:
    """Removes the secret from the environment, so that no other program inherits it, and returns it.

    Empty if there is none. Raises `ArgumentError` when it is too short.
    """
    text = os.environ.pop(VARIABLE, None)
    return Secret(b"") if text is None else _of_text(text.strip().encode(), VARIABLE)


def use(secret: Secret) -> None:
    """From now on, this process signs and checks messages with this secret."""
    _current[:] = [secret]


def current() -> Secret:
    """The secret in use: the one in the environment until `use` is called."""
    if not _current:
        use(environment_secret())
    return _current[0]


_current: list[Secret] = []
