"""`meshpipe train`."""

import sys

from meshpipe.cli.arguments import CANNOT_BE, configure, origin
from meshpipe.cli.devices import take_devices


def train(arguments: list[str]) -> int:
    from meshpipe.distributed import DistributedConfig

    recipe, config, distributed = configure("train", arguments, "Trains a recipe.", DistributedConfig())
    from meshpipe.coordination import coordinator_address, process_count, process_index
    from meshpipe.distributed import FAILED, Guard, join, leave, own_address
    from meshpipe.pipeline.peers import open_peers
    from meshpipe.report import make_console
    from meshpipe.run import run
    from meshpipe.signals import StopRequest

    try:
        join(distributed)
    except ConnectionError as error:
        print(f"meshpipe: {error}", file=sys.stderr)
        return FAILED
    several = process_count() > 1
    console = make_console(quiet=process_index() > 0)
    try:
        with Guard(config.checkpoint.checkpoint_dir) as guard, StopRequest() as stop:
            take_devices(config, console)
            if several:
                open_peers(own_address(coordinator_address()), accelerators=distributed.transfers == "sockets")
            status = run(config, recipe, console, guard, stop, distributed.step_timeout)
    except ValueError as error:
        if not several:
            raise
        print(f"meshpipe: {error}{origin(error)}", file=sys.stderr)
        status = CANNOT_BE
    if several:
        leave(status)
    return status
