"""What the scripts here begin with: the place of a process in its run, and joining it."""

import argparse

import meshpipe
from meshpipe.processes.config import DistributedConfig
from meshpipe.processes.join import join


def place_parser() -> argparse.ArgumentParser:
    """The flags with which `run_processes` calls a script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator")
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--process-count", type=int)
    parser.add_argument("--transfers", default="auto")
    return parser


def join_run(flags: argparse.Namespace, devices: int | None) -> argparse.Namespace:
    """Joins the run that the flags place this process in, with so many CPU devices, or as many as JAX makes; the
    flags.
    """
    if devices is not None:
        meshpipe.use_cpu_devices(devices)
    names = ("coordinator", "process_id", "process_count", "transfers")
    join(DistributedConfig(**{name: getattr(flags, name) for name in names}))
    return flags


def member(devices: int | None = None, *, shared: bool = False) -> argparse.Namespace:
    """Joins the run, and returns the flags. `devices` are of this process, or, if `shared`, of all together."""
    flags = place_parser().parse_args()
    if shared and devices is not None:
        devices //= flags.process_count or 1
    return join_run(flags, devices)
