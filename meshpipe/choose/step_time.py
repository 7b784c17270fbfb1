"""How long a step takes on a described machine, from the times of its programs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from meshpipe.hardware.hardware import Hardware
from meshpipe.plan.plan import Plan
from meshpipe.plan.shared_cores import Sharing
from meshpipe.plan.simulate import Costs, Timeline

SECONDS_PER_ACTION = 6e-5
"""Host time that the executor takes to start an action, with its transfers; docs/performance.md has measurements."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step of a plan."""

    timeline: Timeline
    """When the actions run, in seconds."""
    host: float
    """Seconds that the host takes longer to start all actions than devices take to run them."""
    around: float
    """Seconds of what comes before the first action and after the last one, such as the update."""

    @property
    def seconds(self) -> float:
        return self.timeline.makespan + self.host + self.around


def step_time(
    plan: Plan,
    costs: Costs,
    around: Sequence[float],
    hardware: Hardware,
    devices_per_rank: int,
    late: Collection[str] = frozenset(),
) -> StepTime:
    """The step of a valid plan.

    Arguments:
        plan: The plan.
        costs: The seconds of its actions and transfers, with all devices of a host busy.
        around: The seconds of what each rank does once per step.
        hardware: The machine.
        devices_per_rank: The devices of a rank, which are next to each other.
        late: As `Timeline.late`.
    """
    sharing = _sharing(hardware, devices_per_rank)
    timeline = Timeline.of(plan, replace(costs, sharing=sharing if sharing.alone > 1 else None), late=late)
    starting = _starting(list(map(len, plan.orders)), sharing)
    late_by = max(0.0, starting - timeline.makespan)
    return StepTime(timeline=timeline, host=late_by, around=_together(around, sharing))


def least_step(
    longest: float,
    busy: Sequence[float],
    actions: Sequence[int],
    around: Sequence[float],
    hardware: Hardware,
    devices_per_rank: int,
) -> float:
    """What `step_time` gives at least, whatever the plan.

    Arguments:
        longest: The seconds of the longest chain of actions that is known, with all devices of a host busy.
        busy: The seconds that each rank computes.
        actions: The number of actions of each rank, at least.
        around: As in `step_time`.
        hardware: The machine.
        devices_per_rank: The devices of a rank.
    """
    sharing = _sharing(hardware, devices_per_rank)
    least = max(_together(busy, sharing), longest / sharing.speed(1), _starting(actions, sharing))
    return least + _together(around, sharing)


def _sharing(hardware: Hardware, devices_per_rank: int) -> Sharing:
    return Sharing(max(1, hardware.devices_per_host // devices_per_rank), hardware.alone)


def _together(seconds: Sequence[float], sharing: Sharing) -> float:
    """How long ranks that begin at once take for their work; those that are done leave their cores to the others."""
    hosts = max(1, -(-len(seconds) // sharing.ranks_per_host))
    return max(sum(seconds) / hosts / sharing.ranks_per_host, max(seconds) / sharing.speed(1))


def _starting(actions: Sequence[int], sharing: Sharing) -> float:
    """How long a host takes to start the actions of its ranks, given those of all ranks."""
    return SECONDS_PER_ACTION * sum(sorted(actions, reverse=True)[: sharing.ranks_per_host])
