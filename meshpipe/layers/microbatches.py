"""The global batch: its fields, cut into microbatches, and which rows of them each stage reads."""

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.data.arrays import field_shape, own_field, read_field
from meshpipe.errors import ArgumentError, kind_of
from meshpipe.mesh import DATA
from meshpipe.sharding import place
from meshpipe.stage.spec import Given
from meshpipe.stage.traced import TracedStage

_PLACED = (Given.SEED, Given.PATHS)
"""Inputs of a stage that are the same in every step."""


class OwnBatch(dict[str, np.ndarray]):
    """The fields of a batch, in arrays that no one else writes to, with the shapes and dtypes of the example."""


class Microbatches:
    """How a batch of the shape of an example is cut into `count` microbatches.

    Raises `ValueError` when the example has no field `input`, or its size is not a multiple of `count` times the
    mesh's data axis.
    """

    def __init__(self, batch: Mapping[str, Any], input: str, count: int, mesh: Mesh):
        self.shapes, self.count = _batch_shapes(batch, input, count, mesh), count
        """Of the fields of the whole batch, and the number of microbatches."""
        self._known = frozenset(self.shapes)
        """The fields that a batch may have; others than those of `shapes` are not read."""

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields after cutting: `[count, examples of a microbatch, ...]`."""
        return {
            name: jax.ShapeDtypeStruct((self.count, s.shape[0] // self.count, *s.shape[1:]), s.dtype)
            for name, s in self.shapes.items()
        }

    @property
    def size(self) -> int:
        """Examples of a whole batch."""
        return next(iter(self.shapes.values())).shape[0]

    def resized(self, size: int, count: int, names: Collection[str] | None = None) -> "Microbatches":
        """Batches of `size` examples in `count` microbatches, with all or some of the fields. It need not divide by the
        data axis.
        """
        other = copy.copy(self)
        other.count = count
        other.shapes = {
            name: jax.ShapeDtypeStruct((size, *shape.shape[1:]), shape.dtype)
            for name, shape in self.shapes.items()
            if names is None or name in names
        }
        return other

    def read(self, batch: Mapping[str, Any]) -> OwnBatch:
        """A copy of the batch that stays valid whatever the caller does with the original.

        Raises `ValueError` when fields, shapes or dtypes differ from those of the example, or numbers do not fit.
        """
        if isinstance(batch, OwnBatch):
            return batch
        self._check(batch)
        return OwnBatch({name: own_field(name, value, self.shapes[name].dtype) for name, value in batch.items()})

    def parts(self, batch: Mapping[str, Any]) -> Iterator[OwnBatch]:
        """A batch of any size in copies of the size of the example, of which the last may be smaller.

        Fields that are not read are left out. Raises `ValueError` when a field is missing or unknown, or differs from
        that of the example in more than the number of examples.
        """
        size = self._count_rows(batch)
        fields = {name: read_field(name, batch[name]) for name in self.shapes}
        return (
            OwnBatch({n: own_field(n, v[at : at + self.size], self.shapes[n].dtype) for n, v in fields.items()})
            for at in range(0, size, self.size)
        )

    def padded(self, batch: OwnBatch) -> OwnBatch:
        """A smaller batch with copies of its last example, up to the size of the example."""

        def pad(value: np.ndarray) -> np.ndarray:
            return np.concatenate([value, np.repeat(value[-1:], self.size - len(value), axis=0)])

        return OwnBatch({name: pad(value) for name, value in batch.items()})

    def place(
        self,
        traced: Mapping[int, TracedStage],
        batch: Mapping[str, Any],
        step: int,
        seed: Mapping[int, jax.Array],
        paths: Mapping[int, jax.Array],
    ) -> dict[int, Any]:
        """What every traced stage reads of a batch, on its submesh, after what was placed before: `seed` and `paths`.

        Raises `ValueError` as `read` does.
        """
        fields: dict[Any, Any] = {name: self._split(value) for name, value in self.read(batch).items()}
        fields[Given.STEP] = np.uint32(step)
        wanted = {s: [fields[name] for name in stage.input_names if name not in _PLACED] for s, stage in traced.items()}
        shardings = {
            s: [
                shape.sharding
                for name, shape in zip(stage.input_names, stage.inputs, strict=True)
                if name not in _PLACED
            ]
            for s, stage in traced.items()
        }
        arrays = place(wanted, shardings)
        placed = {s: {Given.SEED: seed[s], Given.PATHS: paths.get(s)} for s in traced}
        return {
            s: tuple(v for name, v in placed[s].items() if name in stage.input_names) + tuple(arrays[s])
            for s, stage in traced.items()
        }

    def rows_read(self, traced: Mapping[int, TracedStage]) -> np.ndarray:
        """Which rows of a batch the traced stages read on the devices of this process."""
        positions = self._split(np.arange(self.size))
        needed = np.zeros(self.size, bool)
        for stage in traced.values():
            for name, shape in zip(stage.input_names, stage.inputs, strict=True):
                if name in self.shapes:
                    assert shape.sharding is not None
                    for index in shape.sharding.addressable_devices_indices_map(shape.shape).values():
                        needed[positions[index[:2]]] = True
        return np.flatnonzero(needed)

    def _split(self, value: np.ndarray) -> np.ndarray:
        return value.reshape(self.count, -1, *value.shape[1:])

    def _check(self, batch: Mapping[str, Any]) -> None:
        if not isinstance(batch, Mapping):
            raise ValueError(f"A batch must be a dict of arrays. Got {kind_of(batch)}.")
        found = {name: field_shape(name, value).shape for name, value in batch.items()}
        expected = {name: shape.shape for name, shape in self.shapes.items()}
        if found != expected:
            raise ValueError(
                f"Every batch must have the fields and shapes of the example batch, {expected}. Got {found}. "
                "Drop or pad the last, smaller batch (with weight 0 in the loss)."
            )

    def _count_rows(self, batch: Mapping[str, Any]) -> int:
        """The number of examples in a batch; raises `ValueError` as `parts` does."""
        if not isinstance(batch, Mapping):
            raise ArgumentError(f"A batch must be a dict of arrays. Got {kind_of(batch)}.")
        found = {name: field_shape(name, value).shape for name, value in batch.items() if name in self._known}
        expected = {name: shape.shape[1:] for name, shape in self.shapes.items()}
        unknown = [name for name in batch if name not in self._known]
        sizes = {shape[0] for shape in found.values() if shape}
        fits = all(name in found and found[name][1:] == shape for name, shape in expected.items())
        if unknown or not fits or len(sizes) != 1 or 0 in sizes:
            wanted = ", ".join(
                f"{name} [examples{''.join(f', {n}' for n in shape)}]" for name, shape in expected.items()
            )
            got = ", ".join(f"{name} {list(shape)}" for name, shape in found.items())
            raise ArgumentError(
                f"A batch must have the fields of the example batch and at least one example: {wanted}. "
                f"Got {', '.join([*([got] if got else []), *map(repr, unknown)]) or 'no fields'}."
            )
        return sizes.pop()


def _batch_shapes(
    batch: Mapping[str, Any], input: str, num_microbatches: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    if input not in batch:
        raise ValueError(
            f"`input` must name a field of the batch. Got {input!r}; the batch has {', '.join(batch) or 'no fields'}."
        )
    shapes = {name: field_shape(name, value) for name, value in batch.items()}
    for name, shape in shapes.items():
        if not shape.shape:
            raise ValueError(
                f"Every batch field must have the batch size as its leading dim. {name!r} has none: repeat its value "
                "for every example."
            )
    sizes = {name: shape.shape[0] for name, shape in shapes.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"Every batch field must have the same leading dim, the batch size. Got {sizes}.")
    parts = num_microbatches * mesh.shape.get(DATA, 1)
    if sizes[input] % parts:
        raise ValueError(
            f"The batch size must be a multiple of num_microbatches * data. Got {sizes[input]} with "
            f"{num_microbatches} * {mesh.shape.get(DATA, 1)} = {parts}. Choose a multiple of {parts}."
        )
    return shapes
