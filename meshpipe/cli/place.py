"""Which process of its run this is, as far as the flags say it; they need not be valid otherwise."""

import argparse
from typing import Any

from meshpipe.processes.config import DistributedConfig


def place_of(arguments: list[str]) -> DistributedConfig:
    """The flags that say how this process joins its run; those of a run of one process where they are wrong."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, kind in {"coordinator": str, "process_id": int, "process_count": int, "secret_file": str}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", type=kind, dest=name)
    parser.add_argument("--allow-any-address", "--allow_any_address", action="store_true")
    parser.error = _raise  # type: ignore[method-assign]
    try:
        return DistributedConfig(**vars(parser.parse_known_args(arguments)[0]))
    except ValueError:
        return DistributedConfig()


def _raise(message: str) -> Any:
    raise ValueError(message)
