"""The processes that work on one trainer, and what they tell each other."""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

from meshpipe.processes.coordination import delete_key, process_count, process_index, set_key, wait_for_key

_numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)
"""How many groups of the same processes this one has made."""


class Group:
    """The processes with devices of one mesh, and a `name` that no other group has.

    Each of them makes its groups in the same order, so the name is the same in all. It begins the keys and the names of
    transfers of whatever the group works on, so that two trainers cannot take each other's values.
    Raises `ValueError` when this process is none of them.
    """

    def __init__(self, processes: Iterable[int]) -> None:
        self.processes = sorted(set(processes))
        if process_index() not in self.processes:
            raise ValueError(
                "A process can only work on a mesh that has a device of it. "
                f"Got devices of processes {', '.join(map(str, self.processes))}, in process {process_index()}."
            )
        members = ",".join(map(str, self.processes))
        if self.processes == list(range(process_count())):
            members = "all"
        elif len(members) > 16:
            members = hashlib.sha256(members.encode()).hexdigest()[:16]
        self.name = f"group/{members}/{next(_numbers[members])}"
        self.calls = 0
        """Steps and evaluations that this process has begun, each of which needs all."""
        self._rounds: dict[str, int] = defaultdict(int)

    @cached_property
    def is_alone(self) -> bool:
        """Whether this process has nobody to talk to."""
        return self.processes == [process_index()]

    def gather(self, topic: str, text: str, timeout: float) -> list[str]:
        """The texts of all processes, in their order; every process calls it the same number of times.

        Raises `TimeoutError` when one does not within `timeout` seconds.
        """
        if self.is_alone:
            return [text]
        before, key = self._next(topic)
        set_key(f"{key}/{process_index()}", text)
        texts = [wait_for_key(f"{key}/{process}", timeout) for process in self.processes]
        if before is not None:  # whoever has come to this round has read all of the one before
            delete_key(f"{before}/{process_index()}")
        return texts

    def broadcast(self, topic: str, text: str | None, source: int, timeout: float) -> str:
        """The text of process `source`, in all; only that process needs to pass one.

        The source calls it again only after every process has returned from the call before: what it tells has to
        depend on work that the others do after it.
        """
        before, key = self._next(topic)
        if process_index() == source:
            assert text is not None
            if self.is_alone:
                return text
            set_key(key, text)
            if before is not None:
                delete_key(before)
            return text
        return wait_for_key(key, timeout)

    def _next(self, topic: str) -> tuple[str | None, str]:
        """The keys of the round before and of this one."""
        number = self._rounds[topic]
        self._rounds[topic] += 1
        key = f"meshpipe/{self.name}/{topic}"
        return (f"{key}/{number - 1}" if number else None), f"{key}/{number}"
