"""The comparison of schedules: each on the model at hand, or why not."""

import io
import re
from dataclasses import replace

import tiny_recipes
from rich.console import Console

from meshpipe.plan.schedules import SCHEDULES
from meshpipe.report.comparison import compare_schedules
from meshpipe.report.plan import comparison_table
from meshpipe.runs.build import make_chooser


def test_every_schedule_is_there_with_its_bubble_or_its_reason() -> None:
    config = tiny_recipes.pipeline()
    chooser = make_chooser(config)
    rows = {c.schedule: c for c in compare_schedules(chooser, None)}
    assert set(rows) == set(SCHEDULES) - {"inference"}
    one, zero = rows["1f1b"].timeline, rows["zb-h1"].timeline
    assert one is not None
    assert zero is not None
    assert (one.makespan, zero.makespan) == (15.0, 13.0)  # 3 M + 3 (R - 1), and one unit less for each rank
    assert max(one.peak_bytes) > 0
    with_three = replace(chooser, config=replace(config.pipeline, stages_per_rank=3))
    with_three_rows = list(compare_schedules(with_three, None))
    three = {c.schedule: c for c in with_three_rows}
    assert three["interleaved-1f1b"].timeline is None
    assert three["interleaved-1f1b"].reason.startswith("Every stage needs a layer. Got 4 layers for 6 stages")
    assert three["1f1b"].stages_per_rank == 1
    printed = io.StringIO()
    Console(file=printed, width=80, soft_wrap=True).print(comparison_table(with_three_rows))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "interleaved-1f1b" in printed.getvalue()
    assert "does not fit: Every stage needs a layer." in printed.getvalue()
    steps = {c.schedule: c.timeline.makespan for c in with_three_rows if c.timeline is not None}
    names = [line.split()[0] for line in lines if line.split() and line.split()[0] in steps]
    assert [steps[name] for name in names] == sorted(steps.values())
    assert [line.split()[0] for line in lines if line.endswith("fastest")] == names[:1]


def test_a_memory_limit_that_is_too_small_is_said_in_a_few_words() -> None:
    config = tiny_recipes.pipeline()
    limited = replace(config.pipeline, remat="auto", memory_limit="1kB")
    reasons = (row.reason for row in compare_schedules(make_chooser(replace(config, pipeline=limited)), None))
    assert any(re.fullmatch(r"needs [\d.]+ [kM]?B, limit 1 kB", reason) for reason in reasons)
