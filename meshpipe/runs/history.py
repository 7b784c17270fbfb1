"""What a run from Python returns: how it ended, its numbers by step, and the trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from meshpipe.html import html_table
from meshpipe.trainer import Trainer

TIMES = frozenset({"step", "time", "eval_time_s"})
"""What an evaluation's line of the metrics file has beside means."""


class History:
    """Keeps the loss of every step and the means of every evaluation."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.evaluations: dict[int, dict[str, float]] = {}

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        if event == "step":
            self.losses[values["step"]] = values["loss"]
        elif event == "eval":
            self.evaluations[values["step"]] = {name: v for name, v in values.items() if name not in TIMES}


@dataclass(frozen=True, kw_only=True, repr=False)
class RunResult:
    """How a run ended, and its numbers. It holds the trained model in memory: in a sweep, keep only the numbers."""

    status: Literal["completed", "stopped"]
    """`stopped` after a signal, where the run was to handle them."""
    step: int
    """Number of the last update, also of earlier parts of a resumed run."""
    values: Mapping[str, Any]
    """The metrics of the last step of this run, as the metrics file names them; empty where it made none."""
    losses: Mapping[int, float] = field(default_factory=dict)
    """The loss of every step of this run, by its number."""
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """The means of every evaluation, by step and name."""
    checkpoint: str | None = None
    """The folder of its checkpoints, which `meshpipe.load` takes; None where there is none."""
    trainer: Trainer | None = None
    """The trained model; None where the folder held the last step already, so that nothing was left to do."""

    def __repr__(self) -> str:
        loss = f", loss {self.values['loss']:.4f}" if "loss" in self.values else ""
        last = max(self.evaluations, default=None)
        means = {} if last is None else self.evaluations[last]
        held_out = "".join(f", held out {name} {value:.4f}" for name, value in means.items())
        saved = "" if self.checkpoint is None else f", saved in {self.checkpoint}"
        return f"RunResult({self.status} after step {self.step}{loss}{held_out}{saved})"

    def _repr_html_(self) -> str:
        """A table of the evaluations for notebooks."""
        names = list(next(iter(self.evaluations.values()), {}))
        rows = ((step, *(f"{means[name]:.4f}" for name in names)) for step, means in self.evaluations.items())
        return html_table(repr(self), ("step", *names), rows)
