"""`meshpipe train`."""

import itertools
import sys

from meshpipe.cli.arguments import configure, explanation
from meshpipe.cli.devices import take_devices
from meshpipe.errors import is_for_the_user
from meshpipe.phases import phase, silence
from meshpipe.processes.exit_codes import FAILED, INVALID
from meshpipe.processes.launcher_pipe import end_with_launcher
from meshpipe.processes.stop import StopRequest


def train(arguments: list[str], *, stop: StopRequest) -> int:
    """Trains; `stop` is entered, and ends the process until the run takes it over."""
    end_with_launcher()
    if process_number(arguments) not in (None, "0"):
        silence()
    with phase("Importing JAX"):
        from meshpipe.processes.join import DistributedConfig

    recipe, config, distributed = configure("train", arguments, "Trains a recipe.", DistributedConfig())
    with phase("Importing JAX"):
        from meshpipe.host import keep_freed_memory
        from meshpipe.pipeline.peers import open_peers
        from meshpipe.processes.addresses import own_address
        from meshpipe.processes.coordination import coordinator_address, process_count, process_index
        from meshpipe.processes.guard import Guard, leave
        from meshpipe.processes.join import join
        from meshpipe.report.tables import make_console
        from meshpipe.runs.run import run
        from meshpipe.runs.run_folder import in_run_dir

    config = in_run_dir(config)
    try:
        join(distributed)
    except ConnectionError as error:
        print(f"meshpipe: {error}", file=sys.stderr)
        if process_count() > 1:
            leave(FAILED)
        return FAILED
    several = process_count() > 1
    if process_index() > 0:
        silence()
    console = make_console(quiet=process_index() > 0)
    try:
        with Guard(config.checkpoint.checkpoint_dir) as guard:
            stop.end_early = guard.end_early
            take_devices(config, console)
            keep_freed_memory()
            if several:
                open_peers(own_address(coordinator_address()), accelerators=distributed.transfers == "sockets")
            status = run(config, recipe, console, guard, stop, distributed.step_timeout)
    except Exception as error:
        if not several or not is_for_the_user(error):
            raise
        print(f"meshpipe: {explanation(error)}", file=sys.stderr)
        status = INVALID
    if several:
        leave(status)
    return status


def process_number(arguments: list[str]) -> str | None:
    """The number of this process, as far as the flags have it: only process 0 says what it does."""
    flag = "--process-id"
    given = [value for name, value in itertools.pairwise(arguments) if name == flag]
    given += [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")]
    return given[-1] if given else None
