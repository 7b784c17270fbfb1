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
"""Of an object in memory, in the `repr` that Python gives to what has none of its own."""


@runtime_checkable
class Source(Protocol):
    """A random-access data set: the example of an index is the same in every process and run.

    Every example is a dict of arrays, lists or numbers whose shapes and dtypes do not depend on the index. `repr` names
    the data and does not change from run to run: a resumed run compares it with the one that was saved.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class DataConfig(abc.ABC):
    """What is trained on; subclass it for data of your own."""

    @abc.abstractmethod
    def train_source(self) -> Source:
        """Examples to learn from."""

    @abc.abstractmethod
    def eval_source(self) -> Source:
        """Held-out examples, in an order of which any beginning is a fair sample."""


class BatchIterator(Iterator[Batch]):
    """Batches of one source in the order of `seed`; made by `batches`.

    Its state is the number of examples handed out, not of those prefetched, so a run that resumes from it gets exactly
    the batch that would have come next. The batch size may differ from the one of the run that saved it.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, shuffle: bool, epochs: int | None) -> None:
        self._source = source
        self._batch_size = batch_size
        # Grain takes seeds of 32 bits.
        self._order = {"seed": seed % 2**32, "shuffle": shuffle}
        self._epochs = epochs
        self._rows: frozenset[int] | None = None
        self._returned: list[Batch] = []
        self._iterator: Any = None
        self._start(0)

    def read_only(self, rows: Iterable[int]) -> None:
        """From now on reads the examples of these rows of every batch alone; the other rows are zeros."""
        self._rows = frozenset(map(int, rows))
        self._start(self._examples)

    def _start(self, examples: int) -> None:
        dataset = grain.MapDataset.range(len(self._source)).seed(self._order["seed"])
        if self._order["shuffle"]:
            dataset = dataset.shuffle()  # a new order in every epoch
        dataset = dataset.repeat(self._epochs)[examples:].map_with_index(self._read)
        dataset = dataset.batch(self._batch_size, drop_remainder=True)
        # Two threads read ahead: examples are cheap slices, and the cores belong to the training.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        self._examples = examples
        self._returned.clear()
        self.close()
        self._iterator = iter(dataset.to_iter_dataset(options))

    def close(self) -> None:
        """Ends the threads that read ahead; nothing can be read after it."""
        if self._iterator is not None:
            self._iterator.close()

    def _read(self, position: int, index: int) -> Mapping[str, Any]:
        if self._rows is None or position % self._batch_size in self._rows:
            return _arrays(self._source[index])
        return self._blank

    @cached_property
    def _blank(self) -> Mapping[str, Any]:
        return {name: np.zeros_like(value) for name, value in _arrays(self._source[0]).items()}

    def __next__(self) -> Batch:
        batch = self._returned.pop() if self._returned else next(self._iterator)
        self._examples += self._batch_size
        return batch

    def put_back(self, batch: Batch) -> None:
        """Takes back the last batch that was handed out, which is handed out again next."""
        self._returned.append(batch)
        self._examples -= self._batch_size

    def get_state(self) -> dict[str, Any]:
        """The position as values that JSON can hold.

        Raises `ArgumentError` when the `repr` of the source is another in every run, so that none could be resumed.
        """
        source = repr(self._source)
        if ADDRESS.search(source):
            raise ArgumentError(
                "A data source must have a repr that names its data and is the same in every run, since a resumed run "
                f"is compared by it. Got {source[:200]}. Give {type(self._source).__name__} a __repr__ with what its "
                "data depends on, or save no checkpoints."
            )
        return {"examples": self._examples, "source": source, **self._order}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues with the example after the last one that the saved iterator handed out.

        Raises `ValueError` when the state is from other data or another order, where that example has no meaning.
        """
        for name, got in self.get_state().items():
            if name != "examples" and state.get(name) != got:
                raise ValueError(
                    f"A saved data position fits only the data and order it came from. Got {name} {got!r}, "
                    f"saved with {state.get(name)!r}. Restore the old {name}, or start a new run."
                )
        self._start(int(state["examples"]))


def batches(
    source: Source, batch_size: int, seed: int = 0, *, shuffle: bool = True, epochs: int | None = None
) -> BatchIterator:
    """Full batches of a source, stacked along a new first axis; without `epochs` they never end.

    Each epoch has an order of its own. Batches run on across the end of an epoch, so that no example is left out; the
    examples after the last full batch of the last epoch are.
    Raises `ValueError` when the source is smaller than one batch.
    """
    check_whole("batch_size", batch_size)
    if len(source) < batch_size:
        raise ArgumentError(
            f"A data set must have at least one batch of examples. Got {len(source)} in {source!r}, with batches of "
            f"{batch_size}. Pass a smaller `batch_size`, shorter windows, or more data."
        )
    return BatchIterator(source, batch_size, seed, shuffle, epochs)


def example_batch(source: Source, batch_size: int) -> Batch:
    """A batch with the shapes and dtypes that training will see: the first example, `batch_size` times.

    Raises `ValueError` when the source is empty.
    """
    if not len(source):
        raise ValueError(f"A data set must have at least one example. Got none in {source!r}.")
    return {name: np.stack([value] * batch_size) for name, value in _arrays(source[0]).items()}


def _arrays(example: Mapping[str, Any]) -> Batch:
    """Every field as one array: a list is a row of a batch, and not one field for each of its elements."""
    return {name: read_field(name, value) for name, value in example.items()}
