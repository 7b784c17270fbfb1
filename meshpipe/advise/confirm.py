"""Compiles the programs of the best layouts for the devices, and predicts their steps from what XLA made."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from heapq import heappop, heappush

import jax

from meshpipe.advise.advice import Confirmed
from meshpipe.advise.estimate import Estimate
from meshpipe.advise.search import Found, choice_of
from meshpipe.choose.step_prediction import StepPrediction, predict_step
from meshpipe.compiled.compile_for import compile_for
from meshpipe.compiler.cache import open_cache
from meshpipe.compiler.compiler import Compiler
from meshpipe.config import Config
from meshpipe.hardware.hardware import Hardware
from meshpipe.machine import format_bytes
from meshpipe.phases import phase
from meshpipe.runs.build import make_chooser

WORTH_COMPILING = 2.0
"""The best of a family is compiled unless it takes this many times as long as the fastest estimate."""
LEAST = 2
"""Layouts that are tried in any case: one alone does not say how far off estimates are."""
CAUTION = 0.9
"""Estimates may be this much further off than those that are known, before a layout is not tried."""


def worth_compiling(found: Found, count: int) -> list[list[Estimate]]:
    """The best of each family that comes near, then the fastest of all: at most `count`, the fastest first. After each
    come those that differ in rematerialisation and schedule alone, and need less memory.
    """
    if not found.fastest:
        return []
    limit = WORTH_COMPILING * found.fastest[0].seconds
    bests = [f.best for f in found.families.values() if f.best is not None and f.best.seconds < limit]
    chosen = {estimate.layout: estimate for estimate in sorted(bests, key=lambda e: e.seconds)[:count]}
    for estimate in found.fastest:
        if len(chosen) < count:
            chosen.setdefault(estimate.layout, estimate)
    return [with_smaller(best, found) for best in sorted(chosen.values(), key=lambda estimate: estimate.seconds)]


def with_smaller(best: Estimate, found: Found) -> list[Estimate]:
    """An estimate and its alternatives, the fastest first, each smaller than all before it."""
    smaller = [best]
    for other in sorted(found.alternatives[choice_of(best.layout)], key=lambda estimate: estimate.seconds):
        if other.memory < smaller[-1].memory:
            smaller.append(other)
    return smaller


def confirm_best(
    what: str, choices: Sequence[Sequence[Estimate]], confirm: Callable[[Estimate], Confirmed]
) -> list[Confirmed]:
    """What `confirm` says of the choices that can still win, the fastest first; as often as there are choices, at most.

    An estimate cannot win that is longer than the best known step even if it is as far too long as the worst so far,
    and `CAUTION` further. Where one is refused, the next alternative of the same choice is tried in its turn.
    `what` says what is done, for people.
    """
    known: list[Confirmed] = []
    began, best, lowest = time.monotonic(), float("inf"), float("inf")
    waiting = [(choice[0].seconds, place, 0) for place, choice in enumerate(choices)]  # a heap, as it is in order
    with phase(what, "layout", len(choices)) as now:
        while waiting and len(known) < len(choices):
            seconds, place, number = heappop(waiting)
            if len(known) >= LEAST and best < CAUTION * lowest * seconds:
                break
            if known:
                left = (time.monotonic() - began) / len(known) * min(len(waiting) + 1, len(choices) - len(known))
                now.describe(f"{what} at most {_duration(left)} left,")
            found = confirm(choices[place][number])
            known.append(found)
            if not found.reason:
                best = min(best, found.estimate.seconds)
                lowest = min(lowest, found.estimate.seconds / seconds)
            elif number + 1 < len(choices[place]):
                heappush(waiting, (choices[place][number + 1].seconds, place, number + 1))
            now.next()
        now.describe(what)
    return known


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def compile_best(
    choices: Sequence[Sequence[Estimate]],
    config: Config,
    devices: Sequence[jax.Device],
    hardware: Hardware,
    limit: float,
) -> list[Confirmed]:
    """What compiled programs say of the layouts that can win: time and memory, or why they cannot be.

    Arguments:
        choices: The layouts, the most promising first, each with its alternatives.
        config: The run.
        devices: All devices of the target; they may be only described.
        hardware: What the devices are.
        limit: The bytes of a device that a step may need.

    Equal programs are compiled once, and kept in the folder `compile_cache` of the config.
    """
    compiler = Compiler(open_cache(config.compile_cache), repr(hardware))

    def confirm(estimate: Estimate) -> Confirmed:
        return _confirmed(estimate, config, devices, hardware, limit, compiler)

    return confirm_best("Compiling the best,", choices, confirm)


def _confirmed(
    estimate: Estimate,
    config: Config,
    devices: Sequence[jax.Device],
    hardware: Hardware,
    limit: float,
    compiler: Compiler,
) -> Confirmed:
    try:
        predicted = _predict(estimate, config, devices, hardware, compiler)
    except ValueError as error:  # what the compiler refuses, or the model
        return Confirmed(estimate=estimate, how="compiled", reason=". ".join(str(error).split(". ")[:2]).rstrip("."))
    memory = float(predicted.fullest.total)
    reason = "" if memory <= limit else f"compiled, it needs {format_bytes(memory)} of {format_bytes(limit)}"
    compiled = replace(
        estimate,
        seconds=predicted.step_seconds,
        bubble=predicted.timeline.bubble_fraction,
        memory=memory,
    )
    return Confirmed(estimate=compiled, how="compiled", reason=reason)


def _predict(
    estimate: Estimate, config: Config, devices: Sequence[jax.Device], hardware: Hardware, compiler: Compiler
) -> StepPrediction:
    laid_out = estimate.layout.configure(config)
    chooser = make_chooser(laid_out, mesh=laid_out.mesh.build(devices))
    model = chooser.choose()
    programs = compile_for(model, chooser.transformation, clip_norm=config.optimizer.clip_norm, compiler=compiler)
    return predict_step(model, chooser.transformation, programs, hardware)
