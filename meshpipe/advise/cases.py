"""In which settings layers are measured, so that the times of all layouts of a search follow from them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshpipe.advise.estimate import Estimator
from meshpipe.advise.layout import Layout
from meshpipe.advise.stage_needs import needs_of
from meshpipe.advise.times import SPLIT
from meshpipe.plan.plan import Op

TOGETHER = 3
"""Equal layers that are measured as one stage, at most: in most layouts, too, a stage has several."""
MOST_SECONDS = 120.0
"""That the calls may take; with fewer examples if they would take longer."""
CALLS = 16
"""Of each program, about."""


@dataclass(frozen=True)
class Case:
    """A setting in which all layers are measured."""

    tensor: int
    """The size of the tensor axis; the data axis has all other devices."""
    examples: int
    """Of each part of the data axis."""
    remat: str = "none"
    together: int = TOGETHER
    """How many equal layers are one stage, at most."""


@dataclass(frozen=True)
class Cases:
    """What is measured."""

    cases: Sequence[Case] = ()
    seconds: float = 0.0
    """That the calls take, about."""
    splits: bool = False
    """Whether backwards in two parts are among them."""


def cases_of(layouts: Iterable[Layout], estimator: Estimator) -> Cases:
    """The settings to measure for these layouts; none if that does not fit or takes too long, even with few examples.

    `estimator` says how much layers need, and roughly how long they take.
    """
    possible = [layout for layout in layouts if estimator.why_not(layout) is None]
    if not possible:
        return Cases()
    splits = any(layout.schedule in SPLIT for layout in possible)
    tensors = sorted({layout.tensor for layout in possible})
    remats = sorted({layout.remat for layout in possible} - {"none", "full"})
    examples = {int(estimator.examples(layout)) for layout in possible}
    least, most = min(examples), max(examples)
    num_devices = possible[0].num_devices
    while True:
        sizes = _sizes(least, most)
        cases = [Case(tensor, size) for tensor in tensors for size in sizes]
        cases += [Case(t, sizes[1], remat) for t in tensors for remat in remats]
        # With more examples, what a policy recomputes of many layers falls out of the caches; layers are apart.
        policies = [remat for remat in remats if remat != "layer"] if sizes[2:] else []
        cases += [Case(t, sizes[-1], remat, 2 * TOGETHER) for t in tensors for remat in policies]
        cases += [Case(tensors[0], sizes[0], together=1)]
        seconds = sum(_seconds(case, num_devices, estimator) for case in cases)
        if seconds <= MOST_SECONDS and all(_fits(case, num_devices, estimator) for case in cases):
            return Cases(cases, seconds, splits)
        if most <= least + 1:
            return Cases()
        most = max(least + 1, most // 2)


def _sizes(least: int, most: int) -> list[int]:
    """Up to three numbers of examples, with equal factors between them; two at least."""
    return sorted({least, round(math.sqrt(least * most)), max(most, least + 1)})


def _layout(case: Case, num_devices: int) -> Layout:
    return Layout(data=num_devices // case.tensor, tensor=case.tensor, remat=case.remat)


def _seconds(case: Case, num_devices: int, estimator: Estimator) -> float:
    """Of the calls, if no two layers were equal."""
    ops = list(Op) if case.remat == "none" else [Op.FORWARD, Op.BACKWARD]
    layout, examples = _layout(case, num_devices), float(case.examples)
    kinds = {layer.kind: place for place, layer in enumerate(estimator.work.layers)}
    seconds = (estimator.times.seconds(place, op, examples, layout).total for place in kinds.values() for op in ops)
    return CALLS * case.together * sum(seconds)


def _fits(case: Case, num_devices: int, estimator: Estimator) -> bool:
    layout, layers = _layout(case, num_devices), estimator.work.layers
    places = range(len(layers))
    return all(
        needs_of(estimator.work, range(p, min(p + case.together, len(layers))), layout, float(case.examples)).least
        <= estimator.limit
        for p in places
    )
