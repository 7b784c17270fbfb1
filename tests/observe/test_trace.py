"""A trace has an event for every action and transfer, at its time, in a form that Perfetto reads."""

import json
from pathlib import Path

import pytest

from meshpipe.observe.clock import MeasuredStep
from meshpipe.observe.trace import check_trace, write_trace
from meshpipe.plan.lower import Transfer, lower
from meshpipe.plan.schedules import make_plan
from meshpipe.plan.simulate import simulate


def step(begin: float) -> MeasuredStep:
    plan = make_plan("1f1b", 2, 2)
    transfers = [i for i in lower(plan).instructions if isinstance(i, Transfer)]
    return MeasuredStep(simulate(plan), dict.fromkeys(transfers, (0.5, 0.75)), begin)


def test_events_are_complete_and_at_their_times(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    write_trace(file, {3: step(100.0), 4: step(107.0)})
    events = json.loads(file.read_text())["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == 2 * (8 + 4)
    (backward,) = [e for e in complete if e["name"] == "1B1" and e["args"]["step"] == 4]
    assert (backward["ts"], backward["dur"], backward["pid"], backward["tid"]) == (7e6 + 5e6, 2e6, 1, 0)
    assert backward["args"] == {"step": 4, "stage": 1, "kind": "backward", "microbatch": 1}
    (arrival,) = [e for e in complete if e["name"] == "x1.0" and e["args"]["step"] == 3]
    assert (arrival["ts"], arrival["dur"], arrival["pid"], arrival["tid"]) == (0.5e6, 0.25e6, 1, 1)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(0, 0): "compute", (1, 0): "compute", (0, 2): "from rank 1", (1, 1): "from rank 0"}


@pytest.mark.parametrize("path", ["trace.txt", "missing/trace.json"])
def test_a_file_that_cannot_be_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`trace` must name"):
        check_trace(str(tmp_path / path))
