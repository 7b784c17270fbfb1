"""An entry of a table of weights: a tensor of a file, and the leaf that it is here."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from meshpipe.checkpoint.chunks import Region


@dataclass(frozen=True)
class Entry:
    """A tensor and a leaf with the same numbers. Read both ways: import takes tensors apart, export puts them
    together.
    """

    name: str
    """Of the tensor; `{block}` stands for the number of a block, from 0."""
    path: str
    """Of the leaf; `{layer}` stands for the layer of the block, and `{last}` for the head."""
    dims: str = ""
    """Dims of the tensor and of the leaf, as in einops: `(heads head_dim) embed -> embed heads head_dim`. A number is
    that of parts that lie side by side in the tensor. Empty where both have the same."""
    part: int = 0
    """Which of the parts the leaf is."""

    def of_block(self, block: int, last: int) -> "Entry":
        """The entry with the numbers of a block."""
        name, path = self.name.format(block=block), self.path.format(layer=block + 1, last=last)
        return replace(self, name=name, path=path)

    @property
    def is_of_block(self) -> bool:
        return "{block}" in self.name

    @cached_property
    def _groups(self) -> list[list[str]]:
        """The dims of the tensor, each with those that are joined in it."""
        left, joined = self.dims.partition("->")[0], False
        groups: list[list[str]] = []
        for word in left.replace("(", " ( ").replace(")", " ) ").split():
            if word in "()":
                joined = word == "("
                if joined:
                    groups.append([])
            elif joined:
                groups[-1].append(word)
            else:
                groups.append([word])
        return groups

    @cached_property
    def _leaf_dims(self) -> list[str]:
        return self.dims.partition("->")[2].split()

    def _sizes_of(self, leaf_shape: Sequence[int]) -> Mapping[str, int]:
        return dict(zip(self._leaf_dims, leaf_shape, strict=True))

    @property
    def _tensor_dims(self) -> list[str]:
        return [dim for group in self._groups for dim in group]

    def seen_shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor with all of its dims apart."""
        if not self.dims:
            return tuple(leaf_shape)
        sizes = self._sizes_of(leaf_shape)
        return tuple(int(dim) if dim.isdigit() else sizes[dim] for dim in self._tensor_dims)

    def tensor_shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that the tensor has in a file."""
        if not self.dims:
            return tuple(leaf_shape)
        sizes = iter(self.seen_shape(leaf_shape))
        return tuple(math.prod(next(sizes) for _ in group) for group in self._groups)

    def seen_region(self, leaf_region: Region) -> Region:
        """Where a part of the leaf lies in the tensor with all of its dims apart."""
        if not self.dims:
            return leaf_region
        parts = dict(zip(self._leaf_dims, leaf_region, strict=True))
        part = slice(self.part, self.part + 1)
        return tuple(part if dim.isdigit() else parts[dim] for dim in self._tensor_dims)

    def leaf_region(self, seen_region: Region) -> Region:
        """The inverse of `seen_region`."""
        if not self.dims:
            return seen_region
        parts = dict(zip(self._tensor_dims, seen_region, strict=True))
        return tuple(parts[dim] for dim in self._leaf_dims)

    @cached_property
    def keeps_order(self) -> bool:
        """Whether the dims of the leaf follow each other as they do in the tensor."""
        return self._leaf_dims == [dim for dim in self._tensor_dims if not dim.isdigit()]

    def to_leaf(self, seen: np.ndarray) -> np.ndarray:
        """A part of the tensor, its dims apart, in the order of the leaf; a view."""
        if not self.dims:
            return seen
        dims = self._tensor_dims
        single = tuple(i for i, dim in enumerate(dims) if dim.isdigit())
        kept = [dim for dim in dims if not dim.isdigit()]
        return seen.squeeze(single).transpose([kept.index(dim) for dim in self._leaf_dims])


def expanded(table: Iterable[Entry], num_blocks: int) -> Iterator[Entry]:
    """The entries of all blocks, of a table that has those of one."""
    last = num_blocks + 1
    for entry in table:
        for block in range(num_blocks) if entry.is_of_block else (0,):
            yield entry.of_block(block, last)
