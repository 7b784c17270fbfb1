"""Writes measured steps to a file that Perfetto and chrome://tracing can show.

Format: Trace Event Format, complete (X) and metadata (M) events, times in microseconds.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meshpipe.errors import ArgumentError
from meshpipe.files import check_file
from meshpipe.observe.clock import MeasuredStep
from meshpipe.plan.plan import Action

COMPUTE = 0
"""The track of a rank's computation; what it receives from rank r is on track r + 1."""


def check_trace(path: str | None) -> None:
    """Raises `ValueError` when the trace file cannot be written."""
    if path is None:
        return
    file = Path(path)
    if file.suffix != ".json":
        raise ArgumentError(f"`trace` must name a file that ends in .json. Got {path!r}.")
    check_file("trace", file)


def write_trace(file: str | Path, steps: Mapping[int, MeasuredStep]) -> None:
    """Writes the measured steps, by step number, at the times when they ran; each rank is a process of the trace."""
    first = min(step.begin for step in steps.values())
    events = [event for number, step in steps.items() for event in _events(number, step, step.begin - first)]
    used = sorted({(event["pid"], event["tid"]) for event in events})
    names = [event for rank, track in used for event in _names(rank, track)]
    Path(file).write_text(json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"}))


def _events(number: int, step: MeasuredStep, offset: float) -> Iterator[dict[str, Any]]:
    timeline = step.timeline
    for action, start in timeline.starts.items():
        rank = timeline.plan.stage_ranks[action.stage]
        yield {
            **_complete(str(action), action.op.meaning, rank, COMPUTE, offset + start, timeline.ends[action] - start),
            "args": {"step": number, **_arguments(action)},
        }
    for transfer, (start, end) in step.transfers.items():
        track = transfer.source_rank + 1
        yield {
            **_complete(str(transfer.target), "transfer", transfer.target_rank, track, offset + start, end - start),
            "args": {"step": number, "from": str(transfer.source), "to": str(transfer.target)},
        }


def _complete(name: str, category: str, rank: int, track: int, start: float, duration: float) -> dict[str, Any]:
    times = {"ts": round(start * 1e6, 3), "dur": round(duration * 1e6, 3)}
    return {"ph": "X", "name": name, "cat": category, "pid": rank, "tid": track, **times}


def _arguments(action: Action) -> dict[str, Any]:
    return {"stage": action.stage, "kind": action.op.meaning, "microbatch": action.microbatch}


def _names(rank: int, track: int) -> Iterator[dict[str, Any]]:
    if track == COMPUTE:
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    name = "compute" if track == COMPUTE else f"from rank {track - 1}"
    yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": name}}
