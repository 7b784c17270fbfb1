"""`meshpipe plan`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meshpipe.cli.arguments import configure
from meshpipe.files import check_file, expand_fields
from meshpipe.processes.exit_codes import COMPLETED

if TYPE_CHECKING:
    from meshpipe.config import Config


@dataclass(frozen=True)
class _PlanFlags:
    plot: Path | None = None
    """Picture of the plan's timeline and memory to draw; its suffix says the format."""
    save_schedule: Path | None = None
    """File (.txt) to write the plan to, which --schedule takes, also after changes."""
    compare: bool = False
    """Instead of one plan, show what every schedule would cost; by measured costs with --profile or --costs."""
    profile: bool = False
    """Measure each layer on this machine, and show the cut that makes the slowest stage fastest."""
    save_costs: Path | None = None
    """JSON file for what `--profile` measures, which `--costs` reads."""

    def __post_init__(self) -> None:
        expand_fields(self, "plot", "save_schedule", "save_costs")

    def check(self, config: "Config") -> None:
        """Raises `ValueError` when the flags do not fit together, or a file cannot be written."""
        if self.profile and config.pipeline.costs is not None:
            raise ValueError(
                "--profile measures what --costs reads from a file. "
                f"Got both, with {config.pipeline.costs!r}. Leave one of them out."
            )
        if self.save_costs is not None and not self.profile:
            raise ValueError(f"--save-costs saves what --profile measures. Got {str(self.save_costs)!r} without it.")
        if self.compare and (self.plot or self.save_schedule):
            raise ValueError("--compare shows all schedules; --plot and --save-schedule show one. Give either.")
        if self.save_schedule is not None and self.save_schedule.suffix != ".txt":
            raise ValueError(
                "--save-schedule must name a file that ends in .txt, as --schedule does. "
                f"Got {str(self.save_schedule)!r}."
            )
        for name in ("save_costs", "save_schedule"):
            if getattr(self, name) is not None:
                check_file(name, getattr(self, name))


def plan(arguments: list[str]) -> int:
    """Shows what a recipe would do; virtual CPU devices stand for any number of real ones, and hold nothing."""
    recipe, config, extra = configure(
        "plan", arguments, "Shows stages, schedule, bubble and memory; runs no step.", _PlanFlags()
    )
    extra.check(config)
    import jax

    from meshpipe.choose.chooser import measuring_mesh
    from meshpipe.host import keep_freed_memory
    from meshpipe.mesh import use_cpu_devices
    from meshpipe.report.comparison import compare_schedules
    from meshpipe.report.picture import check_picture
    from meshpipe.report.plan import print_comparison, print_plan
    from meshpipe.report.profile import print_profile
    from meshpipe.report.tables import make_console
    from meshpipe.run.setup import make_chooser

    if extra.plot is not None:
        check_picture(extra.plot)
    measures = extra.profile or (config.pipeline.needs_costs and config.pipeline.costs is None)
    platforms = os.environ.get("JAX_PLATFORMS", "") if measures else "cpu"
    if platforms:  # else JAX finds all there are
        jax.config.update("jax_platforms", platforms if "cpu" in platforms else f"{platforms},cpu")
    use_cpu_devices(config.mesh.num_devices)
    mesh = config.mesh.build(jax.devices("cpu"))
    measure_on = measuring_mesh(config.mesh) if measures else None
    if measure_on is not None:
        keep_freed_memory(measure_on)  # as training has it
    chooser = make_chooser(config, mesh=mesh, measure_on=measure_on)
    console = make_console()
    costs = None
    if extra.profile:
        costs = chooser.measure()
        print_profile(console, costs, *chooser.before_and_after(costs))
        if extra.save_costs is not None:
            costs.save(extra.save_costs)
            console.print(f"Saved in {extra.save_costs}; --costs {extra.save_costs} takes them.\n")
    if extra.compare:
        print_comparison(console, recipe, config.pipeline, compare_schedules(chooser, costs))
        return COMPLETED
    model = chooser.choose(costs)
    print_plan(console, recipe, model, chooser.transformation, extra.plot)
    if extra.save_schedule is not None:
        extra.save_schedule.write_text(model.plan.to_text())
        console.print(f"\nWritten to {extra.save_schedule}; --schedule {extra.save_schedule} runs it.")
    return COMPLETED
