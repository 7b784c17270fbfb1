"""Checks that all processes of a group are about to run the same program, before they run it."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence

from meshpipe.processes.coordination import delete_key, process_index, set_key, wait_for_key
from meshpipe.processes.group import Group
from meshpipe.processes.printable import printable

AGREE_SECONDS = 3600.0
"""How long a process waits for another, which may still be compiling."""
PATIENCE_SECONDS = 10.0
"""After this long, a message names the process being waited for."""
HASH = "#"
"""Prefix of a value that is a hash, which messages leave out."""


def agree(group: Group, topic: str, description: Mapping[str, str]) -> None:
    """Compares the descriptions of all processes. Each topic can be used only once per group.

    The first process compares, so the number of messages is linear in the number of processes. Raises `ValueError` in
    every process; it names what differs and where, or the process that failed inside `report_failure`.
    """
    if group.is_alone:
        return
    first = group.processes[0]
    set_key(_own(group, topic), json.dumps({"is": dict(description)}))
    if process_index() == first:
        texts = [_wait_for(_own(group, topic, process), process) for process in group.processes]
        reports = dict(zip(group.processes, map(json.loads, texts), strict=True))
        failed = [
            f"process {process} failed: {found['failed']}" for process, found in reports.items() if "failed" in found
        ]
        verdict = failed[:1] or differences(
            {process: found["is"] for process, found in reports.items() if "is" in found}
        )
        set_key(_verdict(group, topic), json.dumps(verdict))
    found = json.loads(_wait_for(_verdict(group, topic), first))
    delete_key(_own(group, topic))
    if found:
        raise ValueError(
            f"All processes must run the same step. Got: {printable('; '.join(found))}. "
            "Start all with the same command, code and packages."
        )


@contextlib.contextmanager
def report_failure(group: Group, topic: str) -> Iterator[None]:
    """Wraps the work before `agree` and reports an error in it to the others, which would otherwise wait."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not group.is_alone:
            problem = f"{type(error).__name__}: {error}"
            with contextlib.suppress(Exception):  # the coordinator may be gone
                if process_index() == group.processes[0]:
                    set_key(_verdict(group, topic), json.dumps([f"process {process_index()} failed: {problem}"]))
                else:
                    set_key(_own(group, topic), json.dumps({"failed": problem}))
        raise


def differences(descriptions: Mapping[int, Mapping[str, str]] | Sequence[Mapping[str, str]]) -> list[str]:
    """One sentence for each process that differs from an earlier process in a field that both describe."""
    first: dict[str, tuple[int, str]] = {}
    sentences = []
    by_process = descriptions if isinstance(descriptions, Mapping) else dict(enumerate(descriptions))
    for process, description in by_process.items():
        parts = []
        for name, value in description.items():
            other, expected = first.setdefault(name, (process, value))
            if value != expected:
                parts.append(name if value.startswith(HASH) else f"{name} ({value}, not {expected})")
                if other:
                    parts[-1] += f" (compared with process {other})"
        if parts:
            sentences.append(f"process {process} differs in {', '.join(parts)}")
    return sentences


def _wait_for(key: str, process: int) -> str:
    try:
        return wait_for_key(key, PATIENCE_SECONDS)
    except TimeoutError:
        print(f"meshpipe: process {process_index()} is waiting for process {process}.", file=sys.stderr, flush=True)
    try:
        return wait_for_key(key, AGREE_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"Process {process} did not reach this point within {AGREE_SECONDS:.0f} s.") from error


def _own(group: Group, topic: str, process: int | None = None) -> str:
    return f"meshpipe/{group.name}/{topic}/{process_index() if process is None else process}"


def _verdict(group: Group, topic: str) -> str:
    return f"meshpipe/{group.name}/{topic}"
