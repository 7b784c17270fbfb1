"""Reads the text of an optimised XLA program: its computations, their instructions, and how often each one runs."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BYTES = {
    "pred": 1.0,
    "s4": 0.5,
    "u4": 0.5,
    "f4e2m1fn": 0.5,
    "bf16": 2.0,
    "c64": 8.0,
    "c128": 16.0,
    "token": 0.0,
    "opaque": 0.0,
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"^(?:(ENTRY)\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_END = re.compile(r"^\}(?:, execution_thread=.*)?\s*$")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_FAST = re.compile(r"S\([1-9]\d*\)")
"""A memory space in a layout: on a TPU, memory of the chip itself."""


@dataclass(frozen=True)
class Array:
    """The type of one array."""

    dtype: str
    shape: tuple[int, ...]
    is_fast: bool
    """Whether it lies in memory of the chip itself."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return math.ceil(self.size * bytes_of(self.dtype))


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    op: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """What stands behind the operands."""
    called: tuple[str, ...]
    """Names of computations."""
    trips: int | None
    """How often a loop runs its body, where the loop says so."""
    is_root: bool
    number: int | None = None
    """The number of a parameter, or the value of a whole constant."""


@dataclass
class Computation:
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def operands(self, instruction: Instruction) -> list[Array]:
        """The arrays that an instruction reads."""
        known = (self.instructions.get(name) for name in instruction.operands)
        return [array for found in known if found is not None for array in found.results]

    @property
    def root(self) -> Instruction:
        instructions = list(self.instructions.values())
        return next((i for i in instructions if i.is_root), instructions[-1])


class Module:
    """A program of one device."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in _statements(text):
            head = _COMPUTATION.match(line)
            if head is not None:
                current = self.computations[head[2]] = Computation(head[2])
                self.entry = head[2] if head[1] else self.entry
            elif _END.match(line):
                current = None
            elif current is not None and (instruction := _read(line)) is not None:
                current.instructions[instruction.name] = instruction

    def walk(self, *, inside_fusions: bool) -> Iterator[tuple[Computation, Instruction, int, bool]]:
        """Every instruction that runs, its computation, how often it runs, and whether it is a part of a fusion.

        A loop whose length XLA does not know counts as one turn, and of the branches of a condition each counts.
        """
        if self.entry:
            yield from self._walk(self.computations[self.entry], 1, False, inside_fusions)

    def _walk(
        self, computation: Computation, times: int, fused: bool, inside: bool
    ) -> Iterator[tuple[Computation, Instruction, int, bool]]:
        for instruction in computation.instructions.values():
            yield computation, instruction, times, fused
            is_fusion = instruction.op == "fusion"
            if (not inside and is_fusion) or instruction.op in _APPLY_TO_ELEMENTS:
                continue
            for name in instruction.called:
                if name in self.computations:
                    turns = times * self._trips(instruction)
                    yield from self._walk(self.computations[name], turns, fused or is_fusion, inside)

    def _trips(self, instruction: Instruction) -> int:
        """How often an instruction runs what it calls."""
        if instruction.op != "while" or instruction.trips is not None:
            return instruction.trips or 1
        condition = re.search(r"condition=%?([\w.\-]+)", instruction.attributes)
        computation = self.computations.get(condition[1]) if condition else None
        # The loop of a `lax.scan` counts from 0, for as long as it is below its length.
        if computation is None or "direction=LT" not in computation.root.attributes:
            return 1
        found = [computation.instructions.get(name) for name in computation.root.operands[1:2]]
        limits = [i.number for i in found if i is not None and i.op == "constant"]
        return limits[0] if limits and limits[0] else 1


_APPLY_TO_ELEMENTS = (
    *("reduce", "reduce-window", "map", "sort", "scatter", "select-and-scatter", "all-reduce", "all-reduce-start"),
    "reduce-scatter",
)
"""What these call has the size of an element."""


def _statements(text: str) -> Iterator[str]:
    """The lines of a program, those of one instruction joined: the attributes of a Pallas kernel may have several,
    which begin with braces and quotes.
    """
    parts: list[str] = []
    for line in text.splitlines():
        if parts and not (line.startswith(" ") or _COMPUTATION.match(line) or _END.match(line)):
            parts.append(line)
            continue
        yield "".join(parts)
        parts = [line]
    yield "".join(parts)


def bytes_of(dtype: str) -> float:
    """Bytes of an element."""
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0.0


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, which may be a tuple."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text)):
        sizes = [re.sub(r"\D", "", dim) for dim in dims.split(",") if dim.strip()]
        if all(sizes):
            found.append(Array(dtype, tuple(map(int, sizes)), bool(_FAST.search(layout))))
    return tuple(found)


def _read(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    is_root, name, rest = bool(match[1]), match[2], match[3]
    # Layouts have parentheses of their own; an opcode stands after a space, and outside of a tuple's parentheses.
    start = _end_of_parentheses(rest, 0) if rest.startswith("(") else 0
    opcode = _OPCODE.search(rest, max(0, start - 1))
    if opcode is None:
        return None
    end = _end_of_parentheses(rest, opcode.end() - 1)
    inside, attributes = rest[opcode.end() : end - 1], rest[end:]
    trips = _TRIPS.search(attributes)
    return Instruction(
        name=name,
        op=opcode[1],
        results=arrays(rest[: opcode.start()]),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=attributes,
        called=tuple(n for found in _CALLED.findall(attributes) for n in re.findall(r"[\w.\-]+", found)),
        trips=int(trips[1]) if trips and opcode[1] == "while" else None,
        is_root=is_root,
        number=int(inside) if opcode[1] in ("parameter", "constant") and inside.isdigit() else None,
    )


def _end_of_parentheses(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    return len(text)
