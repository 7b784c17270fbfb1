"""Batches from a data set: shuffled, prefetched, and resumable at any example."""

import abc
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from meshpipe.data.arrays import read_field
from meshpipe.errors import ArgumentError, check_whole

Batch = dict[str, np.ndarray]
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{4,}")
"""The memory address in Python's default `repr` of an object."""


@runtime_checkable
class Source(Protocol):
    """A random-access data set: each index gives the same example in every process and run.

    Every example is a dict of arrays, lists or numbers whose shapes and dtypes do not depend on the index. `repr`
    identifies the data and is the same in every run: a resumed run compares it with the saved one.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class DataConfig(abc.ABC):
    """The training data; subclass it for your own data."""

    @abc.abstractmethod
    def train_source(self) -> Source:
        """Examples to learn from."""

    @abc.abstractmethod
    def eval_source(self) -> Source:
        """Held-out examples, in an order such that the first n are a fair sample for any n."""


class BatchIterator(Iterator[Batch]):
    """Batches of one source in the order given by `seed`; created by `batches`.

    Its state is the number of examples returned, not prefetched, so a resumed run gets exactly the next batch. The
    batch size may differ from that of the run that saved the state.
    """

    def __init__(
        self, source: Source, batch_size: int, seed: int, shuffle: bool, epochs: int | None, drop_remainder: bool = True
    ) -> None:
        self._source = source
        self._batch_size = batch_size
        # Grain takes seeds of 32 bits.
        self._order = {"seed": seed % 2**32, "shuffle": shuffle}
        self._epochs, self._drop_remainder = epochs, drop_remainder
        self._rows: frozenset[int] | None = None
        self._returned: list[Batch] = []
        self._iterator: Any = None
        self._start(0)

    def read_only(self, rows: Iterable[int]) -> None:
        """From now on reads only the examples of these rows of every full batch; the other rows are zeros."""
        self._rows = frozenset(map(int, rows))
        self._start(self._examples)

    def _start(self, examples: int) -> None:
        dataset = grain.MapDataset.range(len(self._source)).seed(self._order["seed"])
        if self._order["shuffle"]:
            dataset = dataset.shuffle()  # a new order in every epoch
        dataset = dataset.repeat(self._epochs)[examples:]
        self._in_full_batches = len(dataset) // self._batch_size * self._batch_size
        dataset = dataset.map_with_index(self._read)
        dataset = dataset.batch(self._batch_size, drop_remainder=self._drop_remainder)
        # Only two threads read ahead: examples are cheap slices, and training needs the cores.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        self._examples = examples
        self._returned.clear()
        self.close()
        self._iterator = iter(dataset.to_iter_dataset(options))

    def close(self) -> None:
        """Ends the prefetching threads; nothing can be read afterwards."""
        if self._iterator is not None:
            self._iterator.close()

    def _read(self, position: int, index: int) -> Mapping[str, Any]:
        in_full_batch = position < self._in_full_batches
        if self._rows is None or not in_full_batch or position % self._batch_size in self._rows:
            return _arrays(self._source[index])
        return self._blank

    @cached_property
    def _blank(self) -> Mapping[str, Any]:
        return {name: np.zeros_like(value) for name, value in _arrays(self._source[0]).items()}

    def __next__(self) -> Batch:
        batch = self._returned.pop() if self._returned else next(self._iterator)
        self._examples += _rows(batch)
        return batch

    def put_back(self, batch: Batch) -> None:
        """Takes back the last batch, which is then returned again next."""
        self._returned.append(batch)
        self._examples -= _rows(batch)

    def get_state(self) -> dict[str, Any]:
        """The position in the data, as JSON values.

        Raises `ArgumentError` when the `repr` of the source differs in every run, so that no run could be resumed.
        """
        source = repr(self._source)
        if ADDRESS.search(source):
            raise ArgumentError(
                "A data source must have a repr that identifies its data and is the same in every run, since a resumed "
                f"run compares it. Got {source[:200]}. Give {type(self._source).__name__} a __repr__ with everything "
                "that its data depends on, or save no checkpoints."
            )
        return {"examples": self._examples, "source": source, **self._order}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the last example that the saved iterator returned.

        Raises `ValueError` when the state belongs to other data or another order.
        """
        for name, got in self.get_state().items():
            if name != "examples" and state.get(name) != got:
                raise ValueError(
                    f"A saved data position is valid only for the same data and order. Got {name} {got!r}, "
                    f"saved with {state.get(name)!r}. Restore the old {name}, or start a new run."
                )
        self._start(int(state["examples"]))


def batches(
    source: Source,
    batch_size: int,
    seed: int = 0,
    *,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
) -> BatchIterator:
    """Batches of a source, stacked along a new first axis; endless without `epochs`.

    Each epoch has its own order. A batch may span two epochs, so no example is left out, except those after the last
    full batch of the last epoch. Without `drop_remainder`, they are a last, smaller batch.
    Raises `ValueError` when the source is smaller than one batch, or empty.
    """
    check_whole("batch_size", batch_size)
    if not drop_remainder and not len(source):
        raise ArgumentError(f"A data set must have at least one example. Got none in {source!r}.")
    if drop_remainder and len(source) < batch_size:
        raise ArgumentError(
            f"A data set must have at least one batch of examples. Got {len(source)} in {source!r}, with batches of "
            f"{batch_size}. Pass a smaller `batch_size`, shorter windows, or more data."
        )
    return BatchIterator(source, batch_size, seed, shuffle, epochs, drop_remainder)


def example_batch(source: Source, batch_size: int) -> Batch:
    """A batch with the shapes and dtypes of training: the first example, repeated `batch_size` times.

    Raises `ValueError` when the source is empty.
    """
    if not len(source):
        raise ValueError(f"A data set must have at least one example. Got none in {source!r}.")
    return {name: np.stack([value] * batch_size) for name, value in _arrays(source[0]).items()}


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _arrays(example: Mapping[str, Any]) -> Batch:
    """Every field as one array: a list is one field, not one field per element."""
    return {name: read_field(name, value) for name, value in example.items()}
