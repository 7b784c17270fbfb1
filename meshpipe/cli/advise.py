"""`meshpipe advise`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshpipe.cli.arguments import configure
from meshpipe.cli.flags import changed_arguments
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED, FAILED

if TYPE_CHECKING:
    from meshpipe.advise.advice import Advice
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
UNUSED_FLAGS = ("partition", "costs", "memory-limit")


@dataclass(frozen=True)
class _AdviseFlags:
    target: str = ""
    """The devices to find a layout for: `tpu:v5p:4x4x4` (a slice), `gpu:h100:8` (a host of 8), `gpu:h100:4x8` (4 hosts
    of 8), or a machine that a file describes, `FILE.json:8`."""
    top: int = 5
    """How many of the best layouts to show."""
    usable_memory: str | None = None
    """The most bytes that a step may need of each device, e.g. `70GiB`. None is 92 % of its memory."""
    json: bool = False
    """Print everything as JSON instead of tables."""

    def __post_init__(self) -> None:
        check_whole("top", self.top, below=1001)
        if self.usable_memory is not None:
            from meshpipe.pipeline.config import parse_bytes  # late: it imports JAX

            parse_bytes(self.usable_memory)


def advise(arguments: list[str]) -> int:
    """Finds the fastest layout of a recipe on given devices; exits 1 where nothing fits."""
    recipe, config, extra = configure(
        "advise", arguments, "Finds the fastest layout for given devices; runs no step.", _AdviseFlags()
    )
    if not extra.target:
        raise ArgumentError("`target` must say which devices to find a layout for. Got none. Add e.g. gpu:h100:8.")
    with phase("Importing JAX"):
        from meshpipe.advise.table import print_advice
        from meshpipe.hardware.target_name import parse_target
        from meshpipe.report.tables import make_console
        from meshpipe.runs.recipe import find

    target = parse_target(extra.target)
    fixed = _fixed(config, arguments)
    advice = _advice(recipe, find(recipe).config(), config, target, fixed, extra)
    if extra.json:
        print(json.dumps({"recipe": recipe, **advice.as_json()}, indent=1))
    else:
        print_advice(make_console(), recipe, advice, extra.top)
    return COMPLETED if advice.best else FAILED


def _advice(
    recipe: str,
    before: "Config",
    config: "Config",
    target: "TargetName",
    fixed: Mapping[str, Any],
    extra: _AdviseFlags,
) -> "Advice":
    import jax

    from meshpipe.advise.advise import advise_on
    from meshpipe.mesh import use_cpu_devices
    from meshpipe.models.attention import cpu_devices_stand_in
    from meshpipe.pipeline.config import parse_bytes
    from meshpipe.stage.target import ACCELERATOR

    jax.config.update("jax_platforms", "cpu")
    use_cpu_devices(2)
    given = changed_arguments(before, config, leave_out={*LAYOUT_FLAGS, *UNUSED_FLAGS})
    with cpu_devices_stand_in():
        return advise_on(
            config,
            target,
            devices=jax.devices("cpu"),
            programs_for=ACCELERATOR,
            fixed=fixed,
            memory=None if extra.usable_memory is None else parse_bytes(extra.usable_memory),
            command=lambda layout: shlex.join(["meshpipe", "train", recipe, *layout.arguments(), *given]),
        )


def _fixed(config: "Config", arguments: Sequence[str]) -> dict[str, Any]:
    """The fields of a layout that the user has settled."""
    given = {argument.partition("=")[0].lstrip("-").replace("_", "-") for argument in arguments}
    for name in UNUSED_FLAGS:
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
