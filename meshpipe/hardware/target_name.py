"""What `--target` names: a number of devices of a described machine, in an arrangement that exists."""

import math
import re
from dataclasses import dataclass
from itertools import combinations_with_replacement

from meshpipe.errors import ArgumentError
from meshpipe.hardware.catalogue import FILE_SUFFIX, find_hardware, known_hardware
from meshpipe.hardware.hardware import Hardware, Slices

HERE = "here"
"""The devices of this machine."""
CPU = "cpu"
"""Virtual CPU devices of this machine, which stand in for any."""
FORMS = "tpu:v5p:4x4x4 (a slice), gpu:h100:8 (a host), gpu:h100:4x8 (hosts x GPUs), machine.json:8 (a file), or cpu"
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}
"""Names that Google Cloud and others have for TPUs, and those of the catalogue."""
_CLOUD_NAME = re.compile(r"(?:tpu:)?(v2|v3|v4|v5p|v5litepod|v5e|v6e)-(\d+)")
"""What Google Cloud calls a slice."""
_COUNTED_IN_CORES = ("v2", "v3", "v4", "v5p")
"""TPUs whose cloud names count cores, two of a chip; those of others count chips."""
_MOST_HOSTS = 65536
_LONGEST_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class TargetName:
    """Devices that programs are written and compiled for."""

    text: str
    """As the user wrote it."""
    hardware: Hardware
    shape: tuple[int, ...]
    """Of a TPU slice, in chips; else (hosts, devices of each)."""
    num_devices: int
    hosts: int

    @property
    def devices_per_host(self) -> int:
        return self.num_devices // self.hosts

    def check_size(self, needed: int) -> None:
        """Raises `ArgumentError` when a mesh of `needed` devices is larger than the target."""
        if needed > self.num_devices:
            raise ArgumentError(
                f"A mesh must not have more devices than its target. Got a mesh of {needed:,}, with "
                f"{self.num_devices:,} in {self.text}. Choose smaller mesh axes, or a larger target."
            )

    def __str__(self) -> str:
        hosts = "" if self.hosts == 1 else f", {self.hosts:,} hosts"
        return f"{self.text} ({self.num_devices:,} x {self.hardware.device_kind}{hosts})"


def parse_target(text: str) -> TargetName:
    """The devices that a text such as `tpu:v5p:4x4x4`, `gpu:h100:4x8` or `machine.json:8` names. But for a file, upper
    and lower case are the same.

    Raises `ArgumentError` for machines that are not known, and arrangements that do not exist.
    """
    *machine, size = (part.strip() for part in text.split(":"))
    if not any(part.endswith(FILE_SUFFIX) for part in (*machine, size)):
        machine, size = [_OTHER_NAMES.get(part.lower(), part.lower()) for part in machine], size.lower()
        _check_not_cloud_name(text)
    if machine in ([], ["tpu"], ["gpu"]) or size.endswith(FILE_SUFFIX):
        raise ArgumentError(f"`target` must say what machine, and how many devices: {FORMS}. Got {text!r}.")
    if len(machine) == 2 and not machine[0].endswith(FILE_SUFFIX) and machine[0] in ("tpu", "gpu"):
        hardware = find_hardware(machine[1])
        if hardware.platform != machine[0]:
            raise ArgumentError(
                f"`target` must name a machine with its platform. Got {text!r}, and {machine[1]} is a "
                f"{hardware.platform}. Write {hardware.platform}:{machine[1]}:{size}."
            )
    else:
        name = ":".join(machine)
        if not name.endswith(FILE_SUFFIX):
            raise _not_a_machine(text, machine)
        hardware = find_hardware(name)
    dims = _dims(text, size)
    if hardware.slices is not None:
        return _slice(text, hardware, hardware.slices, dims)
    return _hosts(text, hardware, dims)


def _check_not_cloud_name(text: str) -> None:
    """Raises `ArgumentError` that translates what Google Cloud calls a slice, such as `v5litepod-8`."""
    found = _CLOUD_NAME.fullmatch(text.strip().lower())
    if found is None:
        return
    name, number = _OTHER_NAMES.get(found[1], found[1]), int(found[2])
    in_cores = name in _COUNTED_IN_CORES
    chips = -(-number // 2) if in_cores else number
    unit = "cores, two of a chip" if in_cores else "chips"
    slices = find_hardware(name).slices
    assert slices is not None
    way = _nearest(f"tpu:{name}:", slices, (chips,))
    raise ArgumentError(f"`target` must give the shape of a slice in chips. Got {text!r}, which counts {unit}. {way}")


def _not_a_machine(text: str, machine: list[str]) -> ArgumentError:
    known = known_hardware()
    way = ""
    if len(machine) == 1 and machine[0] in known:
        way = f" Write {known[machine[0]].platform}:{text}."
    return ArgumentError(f"`target` must be one of {FORMS}. Got {text!r}.{way}")


def _dims(text: str, size: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,6}(x[1-9]\d{0,6}){0,3}", size):
        raise ArgumentError(f"`target` must end in a size such as 8, 4x8 or 4x4x4. Got {size!r} in {text!r}.")
    return tuple(map(int, size.split("x")))


def _hosts(text: str, hardware: Hardware, dims: tuple[int, ...]) -> TargetName:
    most = hardware.devices_per_host
    if len(dims) > 2 or dims[-1] > most or (len(dims) == 2 and dims[0] > _MOST_HOSTS):
        wanted = math.prod(dims)
        start = text.rpartition(":")[0]
        way = f"{start}:{-(-wanted // most)}x{most}" if wanted > most else f"{start}:{most}"
        raise ArgumentError(
            f"`target` must give the devices of a host, or hosts x devices of each; a host of {hardware.name} has at "
            f"most {most}. Got {text!r}. Write for example {way}."
        )
    hosts, each = (1, *dims)[-2:]
    return TargetName(text=text, hardware=hardware, shape=(hosts, each), num_devices=hosts * each, hosts=hosts)


def _slice(text: str, hardware: Hardware, slices: Slices, dims: tuple[int, ...]) -> TargetName:
    chips, shape = math.prod(dims), "x".join(map(str, dims))
    multiple = slices.multiple
    is_whole = multiple is not None and len(dims) == slices.dims and all(dim % multiple == 0 for dim in dims)
    if shape not in slices.shapes and not (is_whole and chips <= slices.most):
        more = "" if multiple is None else f", and all whose {slices.dims} dims are multiples of {multiple}"
        raise ArgumentError(
            f"`target` must name a slice that exists. Of {hardware.name} these do: {', '.join(slices.shapes)}{more}, "
            f"up to {slices.most:,} chips. Got {text!r}. {_nearest(text, slices, dims)}"
        )
    devices, per_host = chips * slices.devices_per_chip, hardware.devices_per_host
    on_one = slices.one_host is not None and chips <= math.prod(map(int, slices.one_host.split("x")))
    hosts = 1 if on_one else max(1, devices // per_host)
    return TargetName(text=text, hardware=hardware, shape=dims, num_devices=devices, hosts=hosts)


def _nearest(text: str, slices: Slices, dims: tuple[int, ...]) -> str:
    """The smallest slice that exists and has at least as many chips."""
    chips = math.prod(dims)
    found = {math.prod(map(int, shape.split("x"))): shape for shape in reversed(slices.shapes)}
    if slices.multiple is not None:
        sides = range(slices.multiple, _LONGEST_SIDE + 1, slices.multiple)
        # Of several shapes with as many chips, the one that is closest to a cube comes last, and stays.
        for sizes in sorted(combinations_with_replacement(sides, slices.dims), key=max, reverse=True):
            if math.prod(sizes) <= slices.most:
                found[math.prod(sizes)] = "x".join(map(str, sizes))
    enough = [size for size in sorted(found) if size >= chips]
    if not enough:
        return f"The largest has {max(found):,} chips: {text.rpartition(':')[0]}:{found[max(found)]}."
    return f"Write for example {text.rpartition(':')[0]}:{found[enough[0]]}."
