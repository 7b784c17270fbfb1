"""Signatures are valid for one key, sender and text; secret files must be private."""

import os
from pathlib import Path

import pytest

from meshpipe.processes.secret import VARIABLE, IntrusionError, Secret, environment_secret, read_secret_file

SECRET = Secret(b"a secret of this run")


def test_a_signed_text_is_verified() -> None:
    for text in ("", "4 15", "two\nlines of ünicode"):
        assert SECRET.check("key", SECRET.sign("key", 1, text)) == text


@pytest.mark.parametrize(
    "forged",
    [
        "",
        "stop now",
        Secret(b"").sign("meshpipe/stop", 1, "5 15"),
        Secret(b"a secret of that run").sign("meshpipe/stop", 1, "5 15"),
        SECRET.derive("another run").sign("meshpipe/stop", 1, "5 15"),
        SECRET.sign("meshpipe/error", 1, "5 15"),
        SECRET.sign("meshpipe/stop", 1, "5 15").replace(" 1 ", " 2 "),
        SECRET.sign("meshpipe/stop", 1, "5 15").replace("5 15", "5 2"),
        "é" + SECRET.sign("meshpipe/stop", 1, "5 15")[1:],
    ],
)
def test_a_value_not_signed_for_its_key_is_refused_and_named(forged: str) -> None:
    with pytest.raises(IntrusionError, match=r"^someone without the run's secret wrote meshpipe/stop"):
        SECRET.check("meshpipe/stop", forged)


def test_the_encoding_of_parts_is_unambiguous() -> None:
    assert SECRET.mac("a", "b c") != SECRET.mac("a b", "c")
    assert SECRET.number("a", 1, 2) != SECRET.number("a", 2, 1)


def test_names_and_numbers_differ_from_run_to_run() -> None:
    other = SECRET.derive("nonces")
    assert SECRET.name("meshpipe/stop") != other.name("meshpipe/stop")
    numbers = {s.number("x 1", receiver, count) for s in (SECRET, other) for receiver in (0, 1) for count in range(99)}
    assert len(numbers) == 4 * 99
    assert max(numbers) >= 2**63


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0123456789abcdef" * 4)
    assert environment_secret()
    assert VARIABLE not in os.environ
    assert not environment_secret()
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(ValueError, match=r"MESHPIPE_SECRET must hold 32 to 4096 characters. Got 5"):
        environment_secret()


def test_a_secret_file_must_be_private(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef" * 4 + "\n")
    for mode in (0o604, 0o640, 0o620, 0o602):
        file.chmod(mode)
        with pytest.raises(ValueError, match=rf"other users must not be able to read or write it. .* mode {mode:03o}"):
            read_secret_file(str(file))
    file.chmod(0o400)
    same = tmp_path / "copy"
    same.touch(0o600)
    same.write_text("0123456789abcdef" * 4)
    assert read_secret_file(str(file)).name("x") == read_secret_file(str(same)).name("x")


def test_an_invalid_secret_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    short = tmp_path / "short"
    short.touch(0o600)
    long = tmp_path / "long"
    long.touch(0o600)
    long.write_bytes(b"x" * 5000)
    for path, message in [
        (tmp_path / "none", "No such file"),
        (fifo, "regular file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "regular file"),
        (short, "Got 0."),
        (long, "to 4096 characters"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_secret_file(str(path))
