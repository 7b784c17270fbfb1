"""Reads the event files of TensorBoard."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c


def read_events(folder: Path) -> Iterator[Event]:
    """The records of all event files of a folder: length, its checksum, data, their checksum."""
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            data = content[12 : 12 + length]
            assert struct.unpack("<I", content[8:12]) == (masked_crc32c(content[:8]),)
            assert struct.unpack("<I", content[12 + length : 16 + length]) == (masked_crc32c(data),)
            yield Event.FromString(data)
            content = content[16 + length :]


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Values by tag and step. A restart hides the steps of earlier files from its own step on."""
    found: dict[tuple[str, int], float] = {}
    for event in read_events(folder):
        if event.session_log.status == SessionLog.START:
            found = {key: value for key, value in found.items() if key[1] < event.step}
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found[value.tag, event.step] = value.simple_value
    return found
