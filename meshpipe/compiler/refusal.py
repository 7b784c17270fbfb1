"""What a compiler says of a program that it refuses, and what is known of the program from before it was compiled."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from meshpipe.errors import ArgumentError
from meshpipe.mesh import DATA

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_TOO_LARGE = re.compile(rf"(?:Used {_SIZE} of [\d.]+\w* hbm|\({_SIZE}\) exceeds (?:the )?available HBM)", re.IGNORECASE)
"""What the compiler for TPUs says of a program that does not fit: the bytes of all of it, arguments too, also where it
says that they are those of temporaries."""


class CompilerError(ArgumentError):
    """What the compiler for a kind of device says of a program that it cannot compile, in one line that names it."""

    def __init__(self, program: str, device_kind: str, reason: str) -> None:
        self.program, self.device_kind, self.reason = program, device_kind, reason
        super().__init__(
            f"XLA must be able to compile every program of a step. For {device_kind}, it refuses {program}: {reason}. "
            "Choose another layout or, if it refuses a kernel of attention, `attention` xla."
        )

    @classmethod
    def of(cls, lowered: jax.stages.Lowered, mesh: Mesh, message: str) -> "CompilerError":
        name = re.search(r"module @(?:jit__?)?(\w+)", lowered.as_text())
        first = re.sub(r"^[A-Z_]+: ", "", message.strip().splitlines()[0]).rstrip(".")
        return cls(name[1] if name else "one", mesh.devices.flat[0].device_kind, first)


@contextmanager
def compiling_stage(stage: int) -> Iterator[None]:
    """While entered, programs that the compiler refuses are those of this stage, and its errors say so."""
    try:
        yield
    except CompilerError as error:
        raise CompilerError(f"{error.program} of stage {stage}", error.device_kind, error.reason) from error


def needed_bytes(message: str) -> int | None:
    """The bytes of a device that a program needs which the compiler refuses with this message; None if it says nothing
    of them.
    """
    found = _TOO_LARGE.search(message)
    if found is None:
        return None
    size, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return round(float(size) * _UNITS[unit.upper()])


def argument_bytes(lowered: jax.stages.Lowered, mesh: Mesh) -> int:
    """The bytes of the arguments on each device; those that are not read do not count."""
    found = re.search(r"@main\((.*)\) -> ", lowered.as_text())
    total = 0.0
    for shape, attributes in re.findall(r"%arg\d+: tensor<([^>]*)>([^%]*)", found[1] if found else ""):
        *dims, dtype = shape.split("x")
        bits = re.search(r"\d+", dtype)
        sharding = re.search(r"sdy\.sharding<@\w+, \[(.*?)\]", attributes)
        axes = re.findall(r'"(\w+)"', sharding[1]) if sharding else []
        parts = math.prod(mesh.shape[axis] for axis in axes)
        total += math.prod(map(int, dims)) * max(8, int(bits[0]) if bits else 8) / 8 / parts
    return round(total)


def spec_of(result: Any, mesh: Mesh) -> PartitionSpec:
    """The sharding of a result; where the compiler would choose it, examples are split over the data axis."""
    if result.sharding is not None:
        return getattr(result.sharding, "spec", PartitionSpec())
    size = mesh.shape.get(DATA, 1)
    return PartitionSpec(DATA) if result.shape and size > 1 and result.shape[0] % size == 0 else PartitionSpec()
