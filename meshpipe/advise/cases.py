"""In which settings layers are measured, so that the times of all layouts of a search follow from them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    devices: int
    """On how many; the others idle."""
    tensor: int
    """The size of the tensor axis; the data axis has all other devices."""
    examples: int
    """Of each part of the data axis."""
    remat: str = "none"
    together: int = TOGETHER
    """How many equal layers are one stage, at most."""
    splits: bool = False
    """Whether backwards in two parts are measured too."""

    @property
    def layout(self) -> Layout:
        return Layout(data=self.devices // self.tensor, tensor=self.tensor, remat=self.remat)


@dataclass(frozen=True)
class Cases:
    """What is measured."""

    cases: Sequence[Case] = ()
    seconds: float = 0.0
    """That the calls take, about."""


def cases_of(layouts: Iterable[Layout], estimator: Estimator) -> Cases:
    """The settings to measure for these layouts; none if that does not fit or takes too long, even with few examples.

    `estimator` says how much layers need, and roughly how long they take.
    """
    possible = [layout for layout in layouts if estimator.why_not(layout) is None]
    if not possible:
        return Cases()
    settings = _settings(possible, estimator)
    examples = {int(estimator.examples(layout)) for layout in possible}
    least, most = min(examples), max(examples)
    while True:
        cases = list(_cases(settings, estimator, most))
        seconds = sum(_seconds(case, possible[0].num_devices, estimator) for case in cases)
        if seconds <= MOST_SECONDS and all(_fits(case, estimator) for case in cases):
            return Cases(cases, seconds)
        if most <= least + 1:
            return Cases()
        most = max(least + 1, most // 2)


_Settings = Mapping[tuple[int, int], Sequence[Layout]]
"""By the number of devices and the size of the tensor axis, the layouts that need the times of layers on them."""


def _settings(layouts: Sequence[Layout], estimator: Estimator) -> _Settings:
    """The layouts by the devices of a rank, where devices share cores; on others, all devices show the same."""
    count = layouts[0].num_devices
    shares = estimator.hardware.alone > 1
    found: dict[tuple[int, int], list[Layout]] = defaultdict(list)
    for layout in layouts:
        found[layout.data * layout.tensor if shares else count, layout.tensor].append(layout)
    # Stages of one device each run beside each other, as soon as there is a microbatch for every rank.
    if apart := [] if count == 1 else found.get((1, 1), []):
        found[count, 1] += [layout for layout in apart if layout.num_microbatches >= layout.pipeline] or apart
    return found


def _cases(settings: _Settings, estimator: Estimator, most: int) -> Iterator[Case]:
    """With so many examples at most."""
    sizes = {}
    for setting, layouts in settings.items():
        examples = {int(estimator.examples(layout)) for layout in layouts}
        sizes[setting] = _sizes(min(examples), min(most, max(examples)))
        splits = any(layout.schedule in SPLIT for layout in layouts)
        yield from (Case(*setting, size, splits=splits) for size in sizes[setting])
    for tensor in sorted({tensor for _, tensor in settings}):
        setting = max(setting for setting in settings if setting[1] == tensor)
        of_tensor = [layout for key, layouts in settings.items() if key[1] == tensor for layout in layouts]
        remats = sorted({layout.remat for layout in of_tensor} - {"none", "full"})
        yield from (Case(*setting, sizes[setting][1], remat) for remat in remats)
        # With more examples, what a policy recomputes of many layers falls out of the caches; layers are apart.
        policies = [remat for remat in remats if remat != "layer"] if sizes[setting][2:] else []
        yield from (Case(*setting, sizes[setting][-1], remat, 2 * TOGETHER) for remat in policies)
    for count in {count for count, _ in settings}:
        setting = min(setting for setting in settings if setting[0] == count)
        yield Case(*setting, sizes[setting][0], together=1)


def _sizes(least: int, most: int) -> list[int]:
    """Up to three numbers of examples, with equal factors between them; two at least."""
    return sorted({least, round(math.sqrt(least * max(least, most))), max(most, least + 1)})


def _seconds(case: Case, num_devices: int, estimator: Estimator) -> float:
    """Of the calls, if no two layers were equal."""
    ops = list(Op) if case.splits else [Op.FORWARD, Op.BACKWARD]
    examples = float(case.examples)
    kinds = {layer.kind: place for place, layer in enumerate(estimator.work.layers)}
    times = [estimator.times.seconds(place, op, examples, case.layout).total for place in kinds.values() for op in ops]
    return CALLS * case.together * sum(times) * case.devices / num_devices


def _fits(case: Case, estimator: Estimator) -> bool:
    layers = estimator.work.layers
    places = range(len(layers))
    cuts = [range(p, min(p + case.together, len(layers))) for p in places]
    return all(
        needs_of(estimator.work, cut, case.layout, float(case.examples)).least <= estimator.limit for cut in cuts
    )
