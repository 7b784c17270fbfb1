"""The machines that meshpipe knows, and those that users describe in files of the same form."""

import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshpipe.documents import DamagedFileError, load_json, parse_json
from meshpipe.errors import ArgumentError
from meshpipe.files import expanded
from meshpipe.hardware.hardware import Hardware

FILE_SUFFIX = ".json"
_MEASURE = "`meshpipe plan --measure-machine FILE.json` writes such a file."
_LARGEST = 1 << 24
"""Bytes of a file that describes a machine."""
_read: dict[str, Hardware] = {}
"""The machines that this process has read from files, by the name that JAX gives their devices."""


@functools.cache
def known_hardware() -> Mapping[str, Hardware]:
    """The described machines by name."""
    entries = parse_json(Path(__file__).with_name("catalogue.json").read_bytes())
    return {entry["name"]: Hardware.of(entry) for entry in entries}


def find_hardware(name: str) -> Hardware:
    """The machine with this name, such as `h100` or `v5p`, or the one that a JSON file describes.

    Raises `ArgumentError` when there is none, or the file is not what it must be.
    """
    if name.endswith(FILE_SUFFIX):
        return read_hardware(expanded("target", name))
    known = known_hardware()
    if name not in known:
        raise ArgumentError(
            f"`target` must name a machine that is known, or a {FILE_SUFFIX} file that describes one. Got {name!r}. "
            f"{_closest(name, list(known))}"
        )
    return known[name]


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, cutoff=0.5)
    close += [other for other in known if other.startswith(name.lower()[:3]) and other not in close]
    meant = f"Did you mean {' or '.join(close[:3])}? " if close else ""
    return f"{meant}Known are {', '.join(known)}."


def read_hardware(file: Path) -> Hardware:
    """The machine that a JSON file describes: one object, of the form that those in `catalogue.json` have."""
    try:
        values: Any = load_json(file.resolve(), _LARGEST)
    except DamagedFileError as error:
        raise ArgumentError(f"{file} must be a JSON file. It {error}. {_MEASURE}") from None
    except OSError as error:
        raise ArgumentError(
            f"`target` must name a file that can be read. Got {str(file)!r}: {error.strerror}. {_MEASURE}"
        ) from None
    if isinstance(values, list) and len(values) == 1:
        values = values[0]
    if not isinstance(values, dict):
        raise ArgumentError(
            f"{file} must be a JSON object that describes one machine. Got {type(values).__name__}. {_MEASURE}"
        )
    try:
        hardware = Hardware.of(values)
        _read[hardware.device_kind] = hardware
        return hardware
    except (ArgumentError, TypeError, KeyError) as error:
        plain = str(error).replace("`", "")  # names of the file, not of flags
        raise ArgumentError(f"{file} is not a valid description of a machine. {plain} {_MEASURE}") from None


def hardware_of(device_kind: str) -> Hardware | None:
    """The known machine whose devices JAX calls so; of several that match, the longest name counts."""
    matching = {
        kind: hardware
        for hardware in known_hardware().values()
        for kind in (hardware.device_kind, *hardware.other_kinds)
        if device_kind.startswith(kind)
    }
    return matching[max(matching, key=len)] if matching else None


def described_hardware(device_kind: str) -> Hardware | None:
    """The machine whose devices are not here: one that this process has read from a file comes before the known one."""
    return _read.get(device_kind) or hardware_of(device_kind)
