"""Writing files of tensors in the format of safetensors: one tensor in memory at a time."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import numpy as np

from meshpipe.weights.tensor_file import DTYPES
from meshpipe.weights.tensor_folder import INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Outline:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Values = Callable[[str], np.ndarray]
"""Gives the values of a tensor, by name, when it is written."""


def write_tensors(folder: Path, outlines: Sequence[Outline], values: Values, largest: int) -> None:
    """Writes tensors, in order, to one file, or to several of up to `largest` bytes with an index, as transformers
    names them; all are on the disk when it returns.
    """
    parts = list(_parts(outlines, largest))
    if len(parts) == 1:
        write_file(folder / SINGLE, parts[0], values)
        return
    files: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_file(folder / name, part, values)
        files |= {outline.name: name for outline in part}
    size = sum(outline.nbytes for outline in outlines)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(file: Path, outlines: Sequence[Outline], values: Values) -> None:
    """Writes one file of safetensors."""
    header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    start = 0
    for outline in outlines:
        header[outline.name] = {
            "dtype": _NAMES[outline.dtype],
            "shape": list(outline.shape),
            "data_offsets": [start, start + outline.nbytes],
        }
        start += outline.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "xb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for outline in outlines:
            _write(opened, outline, values(outline.name))
        opened.flush()
        os.fsync(opened.fileno())


def _write(file: BufferedWriter, outline: Outline, found: np.ndarray) -> None:
    assert found.shape == outline.shape, (outline, found.shape)
    made = np.ascontiguousarray(found.astype(outline.dtype, copy=False))
    file.write(made.reshape(-1).view(np.uint8).data)


def _parts(outlines: Sequence[Outline], largest: int) -> Iterator[list[Outline]]:
    part: list[Outline] = []
    for outline in outlines:
        if part and sum(other.nbytes for other in part) + outline.nbytes > largest:
            yield part
            part = []
        part.append(outline)
    if part:
        yield part
