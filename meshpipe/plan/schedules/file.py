"""Loads a user's plan from a file with the text that `Plan.to_text` writes."""

from pathlib import Path

from meshpipe.files import read_text
from meshpipe.plan.plan import Plan, PlanError
from meshpipe.plan.validate import validate


def load_plan(path: str | Path, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> Plan:
    """The valid plan in a file; `stages_per_rank` None allows any number of stages.

    Raises `ValueError` that names the file when it cannot be read, or when its plan breaks a rule, which is then drawn,
    or has other sizes.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"The schedule must name a readable file of a plan. Got {str(path)!r}: {reason}.") from None
    try:
        plan = Plan.parse(text)
        validate(plan)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    _check_size(path, "ranks", plan.num_ranks, num_ranks, "on the mesh")
    _check_size(path, "microbatches", plan.num_microbatches, num_microbatches, "asked for")
    if stages_per_rank is not None:
        _check_size(path, "stages", plan.num_stages, num_ranks * stages_per_rank, "asked for")
    return plan


def _check_size(path: str | Path, what: str, found: int, asked: int, of: str) -> None:
    if found != asked:
        raise ValueError(
            "The plan in a file must have the requested sizes. "
            f"Got {found} {what} in {path}, and {asked} {of}. Change the one or the other."
        )
