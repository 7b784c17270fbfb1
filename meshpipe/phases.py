"""The phases of long work, such as compiling, told to whoever listens. Nobody listens by default."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Phase:
    """A phase of the work, as it is at the moment; its text is for people: `Compiling stage 2 of 4`."""

    key: int
    """The same for all that is told of one phase."""
    what: str
    unit: str = ""
    """What the work is divided into, if it is, e.g. `stage`."""
    number: int = 0
    """The part being worked on, from 1."""
    total: int = 0
    """How many parts there are."""
    began: float = 0.0
    """On the monotonic clock, in seconds."""
    seconds: float | None = None
    """How long it took; None until it has ended."""

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.what.rstrip(',')} took {self.seconds:.1f} s"
        return f"{self.what} {self.unit} {self.number} of {self.total}" if self.total else self.what


Listener = Callable[[Phase], object]
_listeners: list[Listener] = []
_keys = itertools.count()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While entered, `listener` is called when a phase begins, goes on to its next part and ends, in any thread.

    `with meshpipe.listening(print):` shows the phases of making a trainer.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        if listener in _listeners:
            _listeners.remove(listener)


def silence() -> None:
    """From now on, no present listener is told anything."""
    _listeners.clear()


class phase:
    """A phase, which lasts while it is entered.

    `what` says in words what is done, e.g. `Compiling`, with a comma at its end where the part is to follow one. With
    `total` parts, each a `unit`, `next` begins another one.
    """

    def __init__(self, what: str, unit: str = "", total: int = 0) -> None:
        self._now = Phase(next(_keys), what, unit, min(1, total), total)

    def __enter__(self) -> "phase":
        self._tell(replace(self._now, began=time.monotonic()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def next(self) -> None:
        """One part is done, whichever it was."""
        self._tell(replace(self._now, number=min(self._now.number + 1, self._now.total)))

    def describe(self, what: str) -> None:
        """From now on it is described so."""
        self._tell(replace(self._now, what=what))

    def end(self) -> None:
        """Ends a phase that was entered by hand, if it was and has not ended."""
        if self._now.began and self._now.seconds is None:
            self._tell(replace(self._now, seconds=time.monotonic() - self._now.began))

    def _tell(self, now: Phase) -> None:
        self._now = now
        for listener in tuple(_listeners):
            listener(now)


def each(what: str, unit: str, items: Sequence[Item]) -> Iterator[Item]:
    """The items in turn, as the parts of a phase."""
    with phase(what, unit, len(items)) as now:
        for item in items:
            yield item
            now.next()
