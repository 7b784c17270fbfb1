"""`meshpipe train`."""

from typing import TYPE_CHECKING

from meshpipe.cli.arguments import configure
from meshpipe.cli.joined import begin_joined, run_joined, take_devices_of_run, telling_others
from meshpipe.phases import phase
from meshpipe.processes.stop import StopRequest

if TYPE_CHECKING:
    from meshpipe.processes.guard import Guard


def train(arguments: list[str], *, stop: StopRequest) -> int:
    """Trains; `stop` is entered, and ends the process until the run takes it over."""
    begin_joined(arguments)
    with telling_others("train", arguments):
        with phase("Importing JAX"):
            from meshpipe.processes.config import DistributedConfig

        recipe, config, distributed = configure("train", arguments, "Trains a recipe.", DistributedConfig())
        with phase("Importing JAX"):
            from meshpipe.processes.coordination import process_index
            from meshpipe.report.tables import make_console
            from meshpipe.runs.run import run
            from meshpipe.runs.run_folder import in_run_dir

        config = in_run_dir(config)

    def run_recipe(guard: "Guard") -> int:
        stop.end_early = guard.end_early
        console = make_console(quiet=process_index() > 0)
        take_devices_of_run(config.mesh, console)
        return run(config, recipe, console, guard, stop, distributed.step_timeout)

    return run_joined(distributed, run_recipe, config.checkpoint.checkpoint_dir)
