"""Finds the fastest layouts that fit, without simulating those that cannot be among them."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from meshpipe.advise.candidates import Space
from meshpipe.advise.estimate import Estimate, Estimator
from meshpipe.advise.layout import Layout
from meshpipe.phases import each, phase

MOST_SIMULATED = 400
"""Layouts of each family; the others have bounds that are hardly better."""


@dataclass
class Family:
    """The layouts of one kind of parallelism."""

    name: str
    considered: int = 0
    best: Estimate | None = None
    """The fastest that fits."""
    least: tuple[float, Layout] | None = None
    """What the layout needs that needs the least memory, in bytes of a device."""
    impossible: str | None = None
    """Why a layout of it cannot be; None if all that were considered can."""


@dataclass
class Found:
    """What a search finds."""

    families: dict[str, Family] = field(default_factory=dict)
    """In the order in which they were met."""
    fastest: list[Estimate] = field(default_factory=list)
    """The fastest that fit, best first; of layouts that differ in rematerialisation and schedule alone, one."""
    alternatives: dict[object, list[Estimate]] = field(default_factory=lambda: defaultdict(list))
    """All that fit and were simulated, by `choice_of`."""
    considered: int = 0
    simulated: int = 0


def search(space: Space, estimator: Estimator, keep: int = 12) -> Found:
    """The best layouts of the space, and the best of every family.

    Layouts are taken in the order of a lower bound of their time, until that exceeds what was found.
    """
    found = Found()
    by_family: dict[str, list[tuple[float, Layout]]] = defaultdict(list)
    with phase("Estimating layouts"):
        for layout in space.layouts():
            family = found.families.setdefault(layout.family, Family(layout.family))
            family.considered += 1
            found.considered += 1
            bound = _bound(layout, family, estimator)
            if bound is not None:
                by_family[layout.family].append((bound, layout))
    best: dict[object, Estimate] = {}  # of each choice
    promising = sorted(by_family, key=lambda name: min(bound for bound, _ in by_family[name]))
    for name in each("Simulating layouts,", "family", promising):
        family = found.families[name]
        limit = _kept_limit(best.values(), keep)
        for count, (bound, layout) in enumerate(sorted(by_family[name], key=lambda pair: pair[0])):
            is_enough = family.best is not None and bound >= max(limit, family.best.seconds)
            if is_enough or count >= MOST_SIMULATED:
                break
            if estimator.memory(layout)[0] > estimator.limit:
                continue
            estimate = estimator.estimate(layout)
            found.simulated += 1
            if family.best is None or estimate.seconds < family.best.seconds:
                family.best = estimate
            key = choice_of(layout)
            found.alternatives[key].append(estimate)
            if key not in best or estimate.seconds < best[key].seconds:
                best[key] = estimate
                limit = _kept_limit(best.values(), keep)
    found.fastest = sorted(best.values(), key=lambda estimate: estimate.seconds)[:keep]
    return found


def choice_of(layout: Layout) -> object:
    """The same for layouts that differ in rematerialisation and schedule alone, of which one is worth showing."""
    return (
        layout.pipeline,
        layout.data,
        layout.tensor,
        layout.sharding,
        layout.stages_per_rank,
        layout.num_microbatches,
    )


def _bound(layout: Layout, family: Family, estimator: Estimator) -> float | None:
    """A lower bound of the layout's time; None where it cannot be or does not fit, which the family notes."""
    reason = estimator.why_not(layout)
    if reason is not None:
        family.impossible = family.impossible or reason
        return None
    needed = estimator.least_memory(layout)
    if family.least is None or needed < family.least[0]:
        family.least = needed, layout
    return None if needed > estimator.limit else estimator.least_seconds(layout)


def _kept_limit(found: Iterable[Estimate], keep: int) -> float:
    """What a layout must be faster than, to be among those to keep."""
    seconds = sorted(estimate.seconds for estimate in found)
    return seconds[keep - 1] if len(seconds) >= keep else float("inf")
