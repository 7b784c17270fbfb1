"""Adapters of PEFT, taken apart for the modules here that their module is.

GPT-2's queries, keys and values are one module in transformers and three here. An adapter of PEFT gives each of them
its A, and a part of its B. Where B is made of blocks, which is how an export writes adapters that differ in A, each
gets its own block of both back.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from meshpipe.checkpoint.chunks import Region, whole
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.peft import PeftModule, tensor_name
from meshpipe.weights.tensor_file import Tensor, read_part

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PeftPart:
    """The adapter of a module here: all or a part of one of PEFT."""

    module: PeftModule
    a: Tensor
    """[ranks, inputs]"""
    b: Tensor
    """[outputs, ranks]"""
    ranks: int
    """How many PEFT has."""
    own: slice
    """Which of them are those of this module."""

    @property
    def rank(self) -> int:
        return int(self.own.stop - self.own.start)

    def value_of_a(self, shape: tuple[int, ...]) -> np.ndarray:
        """The factor A as a leaf of this shape, in float32."""
        self.check_a(shape)
        return _read(self.a, (self.own, slice(0, self.a.shape[1]))).T.reshape(shape)

    def value_of_b(self, shape: tuple[int, ...]) -> np.ndarray:
        self.check_b(shape)
        size = self.b.shape[0] // self.module.parts
        return _read(self.b, (slice(self.module.part * size, (self.module.part + 1) * size), self.own)).T.reshape(shape)

    def check_a(self, shape: tuple[int, ...]) -> None:
        """Raises `WeightsError` unless A is that of a leaf of this shape."""
        self._check("lora_A", self.a, (self.ranks, int(np.prod(shape)) // self.rank))

    def check_b(self, shape: tuple[int, ...]) -> None:
        self._check("lora_B", self.b, (int(np.prod(shape)) // self.rank * self.module.parts, self.ranks))

    def check_rank(self) -> None:
        """Raises `WeightsError` for a rank above the inputs or outputs of the module, which no adapter has here."""
        inputs, outputs = self.a.shape[-1] if self.a.shape else 0, self.b.shape[0] if self.b.shape else 0
        self._check("lora_A", self.a, (self.ranks, inputs))
        self._check("lora_B", self.b, (outputs, self.ranks))
        outputs //= self.module.parts
        if self.rank > min(inputs, outputs):
            raise WeightsError(
                "The rank of an adapter must be at most the number of inputs and of outputs of its module: no matrix "
                f"has a higher rank. Got rank {self.rank} in {self.a.file}, where "
                f"{tensor_name(self.module.name, 'lora_A')} is {list(self.a.shape)} and "
                f"{tensor_name(self.module.name, 'lora_B')} is {list(self.b.shape)}. Merge the adapters with PEFT "
                "(merge_and_unload), and import the weights."
            )

    def _check(self, factor: str, tensor: Tensor, expected: tuple[int, int]) -> None:
        if tensor.shape != expected or str(tensor.dtype) not in _DTYPES:
            raise WeightsError(
                f"{tensor_name(self.module.name, factor)} must have the shape {list(expected)}, of rank {self.ranks} "
                f"and its module, and be one of {', '.join(_DTYPES)}. Got {tensor} in {tensor.file}. Name the right "
                "base."
            )


def parts_of(modules: Mapping[str, PeftModule], a: Tensor, b: Tensor, rank: int) -> dict[str, PeftPart]:
    """By path, those of the modules here that are one module of transformers, whose factors are given."""
    every = {path: PeftPart(module, a, b, rank, slice(0, rank)) for path, module in modules.items()}
    parts = len(every)
    if parts == 1 or len(b.shape) != 2 or b.shape[1] != rank or b.shape[0] % parts:  # of the last, `check_b` says so
        return every
    rows = dict(zip(every, np.split(_read(b, whole(b.shape)), parts), strict=True))
    used = [path for path in every if rows[path].any()]
    # Each block begins where the rows of its part do.
    starts = [int(np.flatnonzero(rows[path].any(axis=0))[0]) for path in used[1:]]
    bounds = list(itertools.pairwise([0, *starts, rank]))
    if not used or any(start >= stop for start, stop in bounds):
        return every
    found = {path: replace(every[path], own=slice(*own)) for path, own in zip(used, bounds, strict=True)}
    are_blocks = not any(np.delete(rows[path], part.own, axis=1).any() for path, part in found.items())
    return found if are_blocks else every


def _read(tensor: Tensor, region: Region) -> np.ndarray:
    return read_part(tensor, tensor.shape, region).astype(np.float32)
