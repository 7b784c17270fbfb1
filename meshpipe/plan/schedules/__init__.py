"""The schedules: pure functions from sizes to a valid plan, under the names that users give."""

import difflib

from meshpipe.plan.plan import Plan
from meshpipe.plan.schedules.breadth_first import forwards_of as forwards_of
from meshpipe.plan.schedules.breadth_first import gpipe as gpipe
from meshpipe.plan.schedules.breadth_first import inference as inference
from meshpipe.plan.schedules.breadth_first import looped_bfs as looped_bfs
from meshpipe.plan.schedules.dualpipe import dualpipe_v as dualpipe_v
from meshpipe.plan.schedules.file import load_plan as load_plan
from meshpipe.plan.schedules.one_forward_one_backward import eager_one_f_one_b as eager_one_f_one_b
from meshpipe.plan.schedules.one_forward_one_backward import interleaved_one_f_one_b as interleaved_one_f_one_b
from meshpipe.plan.schedules.one_forward_one_backward import one_f_one_b as one_f_one_b
from meshpipe.plan.schedules.order import loop as loop
from meshpipe.plan.schedules.order import zigzag as zigzag
from meshpipe.plan.schedules.registry import SCHEDULES as SCHEDULES
from meshpipe.plan.schedules.registry import STAGES_PER_RANK as STAGES_PER_RANK
from meshpipe.plan.schedules.registry import Schedule as Schedule
from meshpipe.plan.schedules.registry import takes_stages as takes_stages
from meshpipe.plan.schedules.zero_bubble import zb_h1 as zb_h1
from meshpipe.plan.schedules.zero_bubble import zb_h2 as zb_h2
from meshpipe.plan.schedules.zero_bubble import zb_v as zb_v


def make_plan(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> Plan:
    """The plan of a schedule for the given sizes.

    Arguments:
        name: A registered schedule such as `1f1b`, or the path of a plan file that ends in `.txt`.
        num_ranks: Number of pipeline ranks.
        num_microbatches: Number of equal slices of the batch.
        stages_per_rank: Number of stages that each rank holds. None takes the fewest that the schedule allows, or as
            many as the file has.

    Raises `ValueError` for an unknown name, for sizes that the schedule does not allow, and for a file that is missing,
    breaks a rule or has other sizes.
    """
    if name.endswith(".txt"):
        return load_plan(name, num_ranks, num_microbatches, stages_per_rank)
    if name == "auto":
        raise ValueError(
            "The plan of the schedule auto is made from what the stages of a model cost. Got only sizes. "
            "Pass it to Trainer or a command, or the costs to meshpipe.plan.search.auto.auto_plan."
        )
    if name not in SCHEDULES:
        nearest = difflib.get_close_matches(name.lower(), [*SCHEDULES, "auto"], n=1, cutoff=0.5)
        suggestion = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(
            f"The schedule must be one of {', '.join(SCHEDULES)}, a file of a plan that ends in .txt, or auto to "
            f"train. Got {name!r}.{suggestion}"
        )
    least, _ = STAGES_PER_RANK[name]
    return SCHEDULES[name](num_ranks, num_microbatches, least if stages_per_rank is None else stages_per_rank)
