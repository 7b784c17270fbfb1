"""`meshpipe plan`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meshpipe.cli import measure_machine
from meshpipe.cli.arguments import configure
from meshpipe.cli.plan_target import plan_for
from meshpipe.files import check_file, expand_fields, writing_whole
from meshpipe.hardware.target_name import CPU, parse_target
from meshpipe.phases import phase
from meshpipe.processes.exit_codes import COMPLETED

if TYPE_CHECKING:
    from meshpipe.choose.chooser import Chooser
    from meshpipe.config import Config


@dataclass(frozen=True)
class _PlanFlags:
    target: str = CPU
    """Machine to compile for, such as tpu:v5p:2x2x2, gpu:h100:8 or gpu:h100:4x8 (hosts x GPUs); it need not be here.
    Shows XLA's memory and collectives, and predicts times. `cpu` compiles nothing."""
    json: bool = False
    """With --target, print all numbers as JSON: times in seconds, memory in bytes per device."""
    plot: Path | None = None
    """Draw the plan's timeline and memory to this file; the suffix selects the format. With --target, draw the memory
    of each rank against that of its devices."""
    save_schedule: Path | None = None
    """File (.txt) to write the plan to. Edit it, and pass it as --schedule."""
    wide: bool = False
    """Draw a grid that is wider than the terminal in full, as pages below each other. By default, only the first page
    is drawn."""
    compare: bool = False
    """Compare the cost of all schedules, instead of showing one plan. --profile or --costs compares measured costs."""
    profile: bool = False
    """Measure each layer on this machine, and suggest the partition whose slowest stage is fastest."""
    save_costs: Path | None = None
    """JSON file to write the costs of --profile to, for --costs."""

    def __post_init__(self) -> None:
        expand_fields(self, "plot", "save_schedule", "save_costs")

    def check(self, config: "Config") -> None:
        """Raises `ValueError` when the flags do not fit together, or a file cannot be written."""
        if self.profile and config.pipeline.costs is not None:
            raise ValueError(
                "--profile measures costs, and --costs reads them from a file. "
                f"Got both, with {config.pipeline.costs!r}. Leave one of them out."
            )
        if self.json and self.target == CPU:
            raise ValueError("--json needs --target, such as --target gpu:h100:8: it has the numbers of that machine.")
        others = [name for name in ("compare", "profile", "save_schedule", "wide") if getattr(self, name)]
        if self.target != CPU and others:
            flag = f"--{others[0].replace('_', '-')}"
            raise ValueError(f"--target shows one plan on a machine that need not be here, without {flag}. Got both.")
        if self.save_costs is not None and not self.profile:
            raise ValueError(f"--save-costs needs --profile, whose costs it saves. Got {str(self.save_costs)!r} alone.")
        if self.compare and (self.plot or self.save_schedule):
            raise ValueError("--compare shows all schedules; --plot and --save-schedule are for one. Choose one.")
        if self.save_schedule is not None and self.save_schedule.suffix != ".txt":
            raise ValueError(
                "--save-schedule must name a file that ends in .txt, as --schedule does. "
                f"Got {str(self.save_schedule)!r}."
            )
        for name in ("save_costs", "save_schedule"):
            if getattr(self, name) is not None:
                check_file(name, getattr(self, name))


def plan(arguments: list[str]) -> int:
    """Shows the plan of a recipe. Virtual CPU devices stand in for any number of real ones; nothing is allocated."""
    if measure_machine.is_asked(arguments):
        return measure_machine.measure(arguments)
    recipe, config, extra = configure(
        "plan", arguments, "Shows stages, schedule, bubble and memory; runs no step.", _PlanFlags()
    )
    if extra.target != CPU:
        plan_for(recipe, config, parse_target(extra.target), extra.plot, as_json=extra.json)
        return COMPLETED
    with phase("Importing JAX"):
        import jax

        from meshpipe.choose.chooser import measuring_mesh
        from meshpipe.host import keep_freed_memory
        from meshpipe.mesh import use_cpu_devices
        from meshpipe.models.attention import cpu_devices_stand_in
        from meshpipe.report.picture import check_picture
    from meshpipe.runs.build import make_chooser

    if extra.plot is not None:
        check_picture(extra.plot)
    measures = extra.profile or (config.pipeline.needs_costs and config.pipeline.costs is None)
    platforms = os.environ.get("JAX_PLATFORMS", "") if measures else "cpu"
    if platforms:  # otherwise JAX detects all platforms
        jax.config.update("jax_platforms", platforms if "cpu" in platforms else f"{platforms},cpu")
    use_cpu_devices(config.mesh.num_devices)
    mesh = config.mesh.build(jax.devices("cpu"))
    measure_on = measuring_mesh(config.mesh) if measures else None
    if measure_on is not None:
        keep_freed_memory(measure_on)  # as training has it
    with cpu_devices_stand_in():
        chooser = make_chooser(config, mesh=mesh, measure_on=measure_on)
        _show(recipe, config, extra, chooser)
    return COMPLETED


def _show(recipe: str, config: "Config", extra: _PlanFlags, chooser: "Chooser") -> None:
    from meshpipe.report.comparison import compare_schedules
    from meshpipe.report.plan import print_comparison, print_plan
    from meshpipe.report.profile import print_profile
    from meshpipe.report.tables import make_console
    from meshpipe.runs.build import check_groups_of

    console = make_console()
    costs = None
    if extra.profile:
        costs = chooser.measure()
        print_profile(console, costs, *chooser.before_and_after(costs))
        if extra.save_costs is not None:
            with writing_whole("save_costs", extra.save_costs) as partial:
                costs.save(partial)
            console.print(f"Saved to {extra.save_costs}; use them with --costs {extra.save_costs}.\n")
    if extra.compare:
        print_comparison(console, recipe, config.pipeline, compare_schedules(chooser, costs))
        return
    model = chooser.choose(costs)
    check_groups_of(config, model)
    print_plan(console, recipe, model, chooser.transformation, extra.plot, wide=extra.wide)
    if extra.save_schedule is not None:
        with writing_whole("save_schedule", extra.save_schedule) as partial:
            partial.write_text(model.plan.to_text())
        console.print(f"\nSaved to {extra.save_schedule}; run it with --schedule {extra.save_schedule}.")
