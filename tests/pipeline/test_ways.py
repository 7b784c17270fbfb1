"""Which way arrays move between processes."""

import jax
import pytest

from meshpipe.pipeline import ways


@pytest.mark.parametrize(
    ("backend", "processes", "asked", "way"),
    [
        ("cpu", 2, "auto", "sockets"),
        ("cpu", 2, "server", "server"),
        ("gpu", 8, "auto", "native"),
        ("gpu", 8, "sockets", "sockets"),
        ("tpu", 2, "auto", "native"),
        ("tpu", 3, "auto", "server"),
        ("tpu", 3, "sockets", "sockets"),
    ],
)
def test_the_way_follows_the_devices_unless_one_is_asked_for(
    backend: str, processes: int, asked: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(ways, "process_count", lambda: processes)
    monkeypatch.setattr(ways, "transfers_asked", lambda: asked)
    assert ways.way_between_processes() == way
