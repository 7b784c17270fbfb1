"""The advice on a run: what was searched, what won, and why the others lost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshpipe.advise.estimate import Estimate
from meshpipe.advise.search import Family
from meshpipe.advise.why import why_lost


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """What is known of a layout beyond its estimate."""

    estimate: Estimate
    """By arithmetic and simulation, or as its compiled programs correct it."""
    how: str
    """Where its numbers are from: `estimated`, `compiled` or `measured`."""
    reason: str = ""
    """Why it cannot be, though it was estimated to; empty if it can."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do."""

    devices: str
    """The devices, in words."""
    hosts: int
    batch_size: int
    tokens: int | None
    """Of a batch; None where there are none."""
    limit: float
    """The bytes of a device that a step may need."""
    considered: int
    simulated: int
    seconds: float
    """How long the search took."""
    best: Sequence[Confirmed]
    """The best that were found, best first."""
    families: Sequence[Family]
    refused: Sequence[Confirmed] = ()
    """Layouts that were among the best by arithmetic, and cannot be."""
    command: str = ""
    """What runs the winner; empty if nothing fits."""
    layers: str = "estimated"
    """Where the times of layers are from: `measured`, or `estimated` by the rates of the machine, perhaps with why."""

    @property
    def winner(self) -> Estimate | None:
        return self.best[0].estimate if self.best else None

    def reasons(self) -> Mapping[str, str]:
        """Why each family lost, or that it won."""
        return {family.name: why_lost(family, self.winner, self.limit) for family in self.families}

    def as_json(self) -> dict[str, Any]:
        """Everything, in numbers: times in seconds, memory and traffic in bytes of a device."""
        reasons = self.reasons()
        return {
            "devices": self.devices,
            "batch_size": self.batch_size,
            "memory_limit": self.limit,
            "considered": self.considered,
            "simulated": self.simulated,
            "seconds": self.seconds,
            "layers": self.layers,
            "command": self.command,
            "best": [{**_numbers(found.estimate, self.tokens), "how": found.how} for found in self.best],
            "refused": [{**_numbers(found.estimate, self.tokens), "reason": found.reason} for found in self.refused],
            "families": [
                {
                    "family": family.name,
                    "considered": family.considered,
                    "best": None if family.best is None else _numbers(family.best, self.tokens),
                    "reason": reasons[family.name],
                }
                for family in self.families
            ],
        }


def _numbers(estimate: Estimate, tokens: int | None) -> dict[str, Any]:
    return {
        **vars(estimate.layout),
        "family": estimate.layout.family,
        "step_seconds": estimate.seconds,
        "tokens_per_s": None if tokens is None else tokens / estimate.seconds,
        "bubble_fraction": estimate.bubble,
        "memory": estimate.memory,
        "memory_parts": dict(estimate.memory_parts),
        "step_parts": dict(estimate.parts),
        "bytes_moved": estimate.moved,
    }
