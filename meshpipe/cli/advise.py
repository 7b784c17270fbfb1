"""`meshpipe advise`."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from meshpipe.accelerators import find_accelerators
from meshpipe.cli.arguments import configure
from meshpipe.cli.flags import as_arguments, flags_of, given_flags
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.hardware.target_name import HERE
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED, FAILED

if TYPE_CHECKING:
    from meshpipe.advise.advice import Advice
    from meshpipe.advise.layout import Layout
    from meshpipe.config import Config
    from meshpipe.hardware.target_name import TargetName

LAYOUT_FLAGS = {
    "mesh.pipeline": "pipeline",
    "mesh.data": "data",
    "mesh.tensor": "tensor",
    "sharding": "sharding",
    "schedule": "schedule",
    "stages-per-rank": "stages_per_rank",
    "num-microbatches": "num_microbatches",
    "remat": "remat",
}
"""The flags that advice is about, and the fields of a layout; those that are given are kept."""
SETTLED = ("partition", "costs", "memory-limit")
"""Flags that advice settles itself, whatever the recipe says of them."""
MOST_COMPILED = 12
"""Layouts that are compiled, unless the user says how many."""


@dataclass(frozen=True)
class AdviseFlags:
    target: str = ""
    """Devices to find a layout for: `tpu:v5p:4x4x4` (a slice), `gpu:h100:8` (a host of 8), `gpu:h100:4x8` (4 hosts of
    8), `FILE.json:8` (8 devices of a machine that a file describes), or `here` or `here:4`, the devices of this
    machine, where the best layouts are measured."""
    top: int = 5
    """How many of the best layouts to show."""
    compile: int | None = None
    """How many of the best layouts to compile: XLA's own memory and work then replace the estimates. 0 compiles none.
    None compiles 12 where the compiler for the devices is installed. With `--target here`, how many to run."""
    usable_memory: str | None = None
    """Most bytes that a step may use of each device, e.g. `70GiB`. None is 92 % of its memory."""
    json: bool = False
    """Print all numbers as JSON instead of tables."""

    def __post_init__(self) -> None:
        check_whole("top", self.top, below=1001)
        if self.compile is not None:
            check_whole("compile", self.compile, 0, 1001)
        if self.usable_memory is not None:
            from meshpipe.pipeline.config import parse_bytes  # late: it imports JAX

            parse_bytes(self.usable_memory)


def advise(arguments: list[str]) -> int:
    """Finds the fastest layout of a recipe on given devices; exits 1 where nothing fits."""
    recipe, config, extra = configure(
        "advise", arguments, "Finds the fastest layout for given devices; runs no step.", AdviseFlags()
    )
    if not extra.target:
        raise ArgumentError("`target` must say which devices to find a layout for. Got none. Add e.g. gpu:h100:8.")
    with phase("Importing JAX"):
        from meshpipe.advise.table import print_advice
        from meshpipe.report.tables import make_console
        from meshpipe.runs.recipe import find

    before = find(recipe).config()
    advice = _advice(
        config,
        _fixed(config, arguments),
        extra,
        lambda layout: command_of(recipe, before, layout.configure(config), arguments),
    )
    if extra.json:
        print(json.dumps({"recipe": recipe, **advice.as_json()}, indent=1))
    else:
        print_advice(make_console(), recipe, advice, extra.top)
    return COMPLETED if advice.best else FAILED


def _advice(
    config: "Config", fixed: Mapping[str, Any], extra: AdviseFlags, command: "Callable[[Layout], str]"
) -> "Advice":
    from meshpipe.advise.advise import advise_on
    from meshpipe.models.attention import cpu_devices_stand_in
    from meshpipe.pipeline.config import parse_bytes
    from meshpipe.stage.target import ACCELERATOR

    is_here = extra.target.partition(":")[0] == HERE
    target, devices, count = _here(config, extra) if is_here else _described(extra)
    with nullcontext() if is_here else cpu_devices_stand_in(target.hardware):
        return advise_on(
            config,
            target,
            devices=devices,
            programs_for=ACCELERATOR if devices[0].platform == "cpu" and target.hardware.platform != "cpu" else None,
            count=count,
            fixed=fixed,
            memory=None if extra.usable_memory is None else parse_bytes(extra.usable_memory),
            command=command,
        )


def _described(extra: AdviseFlags) -> tuple["TargetName", Sequence[Any], int]:
    """The target, devices to trace and compile for, and how many layouts to compile."""
    import jax

    from meshpipe.compiler.topology import check_wheels, devices_of
    from meshpipe.hardware.target_name import parse_target
    from meshpipe.mesh import use_cpu_devices

    target = parse_target(extra.target)
    jax.config.update("jax_platforms", "cpu")
    use_cpu_devices(2)
    if extra.compile:
        return target, devices_of(target), extra.compile
    try:
        check_wheels(target)
    except ArgumentError as error:
        if extra.compile is None:
            print(f"meshpipe: layouts are only estimated. {error}", file=sys.stderr)
        return target, jax.devices("cpu"), 0
    return target, devices_of(target), MOST_COMPILED if extra.compile is None else 0


def _here(config: "Config", extra: AdviseFlags) -> tuple["TargetName", Sequence[Any], int]:
    """The same for the devices of this machine, where layouts are measured."""
    import jax

    from meshpipe.advise.here import check_cpu_devices, count_here, most_cpu_devices, target_here
    from meshpipe.host import keep_freed_memory
    from meshpipe.mesh import use_cpu_devices

    asked = count_here(extra.target)
    number = asked or config.mesh.num_devices
    if not find_accelerators():
        check_cpu_devices(number)  # before JAX starts with so many
    use_cpu_devices(min(number, most_cpu_devices()))
    devices = jax.devices()
    if devices[0].platform == "cpu":
        check_cpu_devices(number)
    else:
        number = asked or len(devices)
    if number > len(devices):
        raise ArgumentError(f"`target` here must have its devices. Got {number}, with {len(devices)} on this machine.")
    keep_freed_memory()
    return target_here(devices[:number]), devices[:number], MOST_COMPILED if extra.compile is None else extra.compile


def command_of(recipe: str, before: "Config", laid_out: "Config", arguments: Sequence[str]) -> str:
    """What trains in an advised layout: what the recipe has otherwise, and all that was given.

    Arguments:
        recipe: Its name.
        before: Its config.
        laid_out: The config of the run in the layout.
        arguments: Those of `advise`.
    """
    given = given_flags(arguments)
    names = {name for name, _ in given}
    values = {flag.name: flag.default for flag in flags_of(before)}
    settled = [
        as_arguments(flag.name, flag.default)
        for flag in flags_of(laid_out)
        if flag.name in (*LAYOUT_FLAGS, *SETTLED) and (flag.name in names or flag.default != values[flag.name])
    ]
    own = {form for flag in flags_of(AdviseFlags()) for form in (flag.name, f"no-{flag.name}")}
    others = [words for name, words in given if name not in own and name not in LAYOUT_FLAGS]
    return shlex.join(["meshpipe", "train", recipe, *chain.from_iterable([*settled, *others])])


def _fixed(config: "Config", arguments: Sequence[str]) -> dict[str, Any]:
    """The fields of a layout that the user has settled."""
    given = {name for name, _ in given_flags(arguments)}
    for name in SETTLED:
        if name in given:
            raise ArgumentError(f"advise settles `{name.replace('-', '_')}` itself. Got one. Leave it out.")
    values = {
        **{axis: getattr(config.mesh, axis) for axis in ("pipeline", "data", "tensor")},
        "sharding": config.sharding,
        **{
            name: getattr(config.pipeline, name)
            for name in ("schedule", "stages_per_rank", "num_microbatches", "remat")
        },
    }
    return {field: values[field] for flag, field in LAYOUT_FLAGS.items() if flag in given}
