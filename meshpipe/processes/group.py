"""The processes of one trainer, and their collective exchange of texts."""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

from meshpipe.processes.coordination import delete_key, process_count, process_index, set_key, wait_for_key

_numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)
"""Number of the next group, by the members of the group."""


class Group:
    """The processes with devices in one mesh, with a unique `name`.

    All members create their groups in the same order, so they agree on the name. It prefixes the keys and transfer
    names of the group, so two trainers cannot receive each other's values.
    Raises `ValueError` when this process is not a member.
    """

    def __init__(self, processes: Iterable[int]) -> None:
        self.processes = sorted(set(processes))
        if process_index() not in self.processes:
            raise ValueError(
                "A process can only use a mesh that contains at least one of its devices. "
                f"Got devices of processes {', '.join(map(str, self.processes))}, in process {process_index()}."
            )
        members = ",".join(map(str, self.processes))
        if self.processes == list(range(process_count())):
            members = "all"
        elif len(members) > 16:
            members = hashlib.sha256(members.encode()).hexdigest()[:16]
        self.name = f"group/{members}/{next(_numbers[members])}"
        self.calls = 0
        """Steps and evaluations that this process has begun; each needs all members."""
        self._rounds: dict[str, int] = defaultdict(int)

    @cached_property
    def is_alone(self) -> bool:
        """Whether this process is the only member."""
        return self.processes == [process_index()]

    def gather(self, topic: str, text: str, timeout: float) -> list[str]:
        """All-gathers texts, in order of process. Every member must call it the same number of times.

        Raises `TimeoutError` when a member does not call it within `timeout` seconds.
        """
        if self.is_alone:
            return [text]
        before, key = self._next(topic)
        set_key(f"{key}/{process_index()}", text)
        texts = [wait_for_key(f"{key}/{process}", timeout) for process in self.processes]
        if before is not None:  # every member that reached this round has read all of the previous one
            delete_key(f"{before}/{process_index()}")
        return texts

    def broadcast(self, topic: str, text: str | None, source: int, timeout: float) -> str:
        """Broadcasts the text of process `source`; the others pass None.

        The source may call it again only after every member has returned from the previous call. Its next text must
        therefore depend on work that the others do after that call.
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
        """The keys of the previous round and of this one."""
        number = self._rounds[topic]
        self._rounds[topic] += 1
        key = f"meshpipe/{self.name}/{topic}"
        return (f"{key}/{number - 1}" if number else None), f"{key}/{number}"
