"""Finds the layout to train with on the devices of a described machine."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from meshpipe.advise.advice import Advice, Confirmed
from meshpipe.advise.candidates import REMATS, Space
from meshpipe.advise.confirm import compile_best, with_smaller, worth_compiling
from meshpipe.advise.estimate import Estimate, Estimator
from meshpipe.advise.here import measure_best, measured_machine, with_measured_layers
from meshpipe.advise.layout import Layout
from meshpipe.advise.measured import Measured
from meshpipe.advise.search import Family, Found, choice_of, search
from meshpipe.advise.survey import survey
from meshpipe.advise.times import Roofline
from meshpipe.config import Config
from meshpipe.errors import ArgumentError
from meshpipe.hardware.target_name import HERE, TargetName
from meshpipe.phases import phase
from meshpipe.plan.schedules import SCHEDULES
from meshpipe.stage.target import Target


def advise_on(
    config: Config,
    target: TargetName,
    *,
    devices: Sequence[jax.Device],
    programs_for: Target | None = None,
    fixed: Mapping[str, Any] | None = None,
    memory: int | None = None,
    count: int = 0,
    command: Callable[[Layout], str],
) -> Advice:
    """The advice on a run: its best layouts, and why those of other kinds lost.

    Arguments:
        config: The run; its own layout does not matter.
        target: The devices that it is to use, all of them.
        devices: Two devices or more that stand for them while layers are traced.
        programs_for: The kind of devices that programs are written for; None is that of `devices`.
        fixed: Fields of `Layout` that the layouts must have.
        memory: The bytes of a device that a step may need; None is most of its memory.
        count: How many of the best layouts to compile, or to measure here; `devices` must then be all of the target.
        command: What runs a layout.

    Raises `ValueError` when the model or its data cannot be had, or no layout has what is fixed.
    """
    started = time.perf_counter()
    check_fixed(fixed or {})
    space = space_of(config, target.num_devices, fixed or {})
    if next(space.layouts(), None) is None:
        raise ArgumentError(_nothing(config, target, fixed or {}))
    with phase("Tracing the layers"):
        work = survey(config, devices, programs_for)
    space = replace(space, can_shard=any(parameter.over_data is not None for parameter in work.parameters))
    hardware = measured_machine(target.hardware, devices) if target.text == HERE else target.hardware
    limit = None if memory is None else float(memory)
    estimator = Estimator(work, Roofline(work, hardware), hardware, config.batch_size, limit)
    if target.text == HERE and count:
        estimator = with_measured_layers(estimator, config, devices, space)
    found = search(space, estimator)
    confirmed = _confirmed(found, config, target, devices, estimator.limit, count)
    best = [layout for layout in confirmed if not layout.reason]
    return Advice(
        devices=str(target),
        hosts=target.hosts,
        batch_size=config.batch_size,
        tokens=None if work.tokens is None else work.tokens * config.batch_size,
        limit=estimator.limit,
        considered=found.considered,
        simulated=found.simulated,
        seconds=time.perf_counter() - started,
        best=best,
        refused=[layout for layout in confirmed if layout.reason],
        families=list(found.families.values()),
        command=command(best[0].estimate.layout) if best else "",
        layers=_layers(estimator, is_measured=target.text == HERE and count > 0),
    )


def _layers(estimator: Estimator, *, is_measured: bool) -> str:
    if isinstance(estimator.times, Measured):
        return "measured"
    return "estimated, since measuring them needs too much memory or time" if is_measured else "estimated"


def _confirmed(
    found: Found, config: Config, target: TargetName, devices: Sequence[jax.Device], limit: float, count: int
) -> list[Confirmed]:
    """The best layouts, first those that were compiled or measured, by their times. The estimates of all others are
    scaled by what that changed of these.
    """
    chosen = worth_compiling(found, count)
    if target.text == HERE:
        known = measure_best(chosen, config)
    else:
        known = compile_best(chosen, config, devices, target.hardware, limit) if chosen else []
    before = {estimate.layout: estimate.seconds for choice in chosen for estimate in choice}
    changes = [after.estimate.seconds / before[after.estimate.layout] for after in known if not after.reason]
    factor = statistics.median(changes) if changes else 1.0
    rest = [_scaled(estimate, factor) for estimate in _not_tried(found, known)]
    for family in found.families.values():
        _settle(family, known, rest, factor)
    return [
        *sorted(known, key=lambda layout: layout.estimate.seconds),
        *(Confirmed(estimate=estimate, how="estimated") for estimate in rest),
    ]


def _not_tried(found: Found, known: Sequence[Confirmed]) -> list[Estimate]:
    """The fastest estimates of what was not compiled or measured, or only alternatives to them that were refused."""
    tried = {layout.estimate.layout for layout in known}
    settled = {choice_of(layout.estimate.layout) for layout in known if not layout.reason}
    left = [
        next((estimate for estimate in with_smaller(best, found) if estimate.layout not in tried), None)
        for best in found.fastest
        if choice_of(best.layout) not in settled
    ]
    return sorted((estimate for estimate in left if estimate is not None), key=lambda estimate: estimate.seconds)


def _settle(family: Family, known: Sequence[Confirmed], rest: Sequence[Estimate], factor: float) -> None:
    """The best of a family is the best that was compiled or measured, or else its estimate, scaled."""
    if family.best is None:
        return
    own = [layout for layout in known if layout.estimate.layout.family == family.name]
    possible = [layout.estimate for layout in own if not layout.reason]
    if own and not possible:
        possible = [estimate for estimate in rest if estimate.layout.family == family.name]
    if possible:
        family.best = min(possible, key=lambda estimate: estimate.seconds)
    elif own:
        family.best, family.least, family.impossible = None, None, own[0].reason
    else:
        family.best = _scaled(family.best, factor)


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    parts = {name: factor * seconds for name, seconds in estimate.parts.items()}
    return replace(estimate, seconds=factor * estimate.seconds, parts=parts)


def space_of(config: Config, num_devices: int, fixed: Mapping[str, Any]) -> Space:
    return Space(num_devices=num_devices, batch_size=config.batch_size, num_layers=len(config.layers()), fixed=fixed)


def check_fixed(fixed: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what no layout that is searched can have."""
    remat, schedule = fixed.get("remat"), fixed.get("schedule")
    if remat is not None and remat not in REMATS:
        raise ArgumentError(
            f"`remat` must be one of {', '.join(REMATS)}, as far as layouts are searched. Got {remat!r}."
        )
    if schedule is not None and (schedule not in SCHEDULES or schedule == "inference"):
        names = ", ".join(name for name in SCHEDULES if name != "inference")
        raise ArgumentError(f"`schedule` must be one of {names}, as far as layouts are searched. Got {schedule!r}.")


def _nothing(config: Config, target: TargetName, fixed: Mapping[str, Any]) -> str:
    settled = ", ".join(f"{name} {value}" for name, value in fixed.items())
    return (
        f"A layout must have all {target.num_devices:,} devices and divide the batch of {config.batch_size:,}. "
        f"Got no such layout{f' with {settled}' if settled else ''}. Change the batch size, the target"
        f"{', or what is settled' if settled else ''}."
    )
