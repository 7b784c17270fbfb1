"""`meshpipe launch`."""

import sys
from dataclasses import dataclass

from meshpipe.cli.arguments import parse
from meshpipe.cli.devices import DEVICES
from meshpipe.errors import check_whole

PROCESS_LIMIT = 1025
"""The number of processes must be below this, far more than one machine runs."""


@dataclass(frozen=True)
class _LaunchFlags:
    processes: int
    """Number of processes."""
    devices_per_process: int | None = None
    """Virtual CPU devices per process; by default, the devices of the mesh are divided evenly."""
    max_restarts: int = 0
    """How often a failed run is restarted, from its newest checkpoint if there is one."""
    address: str = "127.0.0.1"
    """Address of this machine on which the processes listen."""

    def __post_init__(self) -> None:
        check_whole("processes", self.processes, below=PROCESS_LIMIT)
        check_whole("max_restarts", self.max_restarts, 0)
        if self.devices_per_process is not None:
            check_whole("devices_per_process", self.devices_per_process)


def launch(arguments: list[str]) -> int:
    """Starts the processes of one run on this machine; the command of each follows `--`."""
    own, separator, command = arguments, "--", []
    if separator in arguments:
        place = arguments.index(separator)
        own, command = arguments[:place], arguments[place + 1 :]
    elif "train" in arguments:
        raise ValueError(
            "The command of the processes must follow --. Got train without it. "
            "Write meshpipe launch --processes N -- train RECIPE."
        )
    flags = parse(_LaunchFlags, own, "meshpipe launch", launch.__doc__)
    if not command or command[0] != "train":
        got = f"Got {command[0]!r}." if command else "Got nothing after it."
        raise ValueError(f"The command after -- must be train: meshpipe launch --processes N -- train RECIPE. {got}")
    if command[1:2] == [] or command[1].startswith("-"):
        raise ValueError("A recipe comes after train: meshpipe launch --processes N -- train RECIPE. Got none.")
    if flags.max_restarts and not any(argument.startswith(("--checkpoint-dir", "--run-dir")) for argument in command):
        raise ValueError(
            f"A run is restarted from its newest checkpoint. Got --max-restarts {flags.max_restarts} without "
            "--run-dir or --checkpoint-dir. Add --run-dir DIR after train RECIPE."
        )
    from meshpipe.processes.addresses import check_one_address
    from meshpipe.processes.launch import Launch, free_port

    if "--allow-any-address" not in command:
        check_one_address("address", flags.address)

    port = 0

    def of_process(number: int, restart: int) -> list[str]:
        nonlocal port
        if number == 0:
            port = free_port(flags.address)
        place = ["--coordinator", f"{flags.address}:{port}", "--process-id", str(number)]
        place += ["--process-count", str(flags.processes)]
        again = []
        if restart and "--resume" not in command:  # a repeated flag overrides the earlier one
            again = ["--auto-resume", "--resume-from", "None"]
        return [sys.executable, "-m", "meshpipe", *command, *place, *again]

    environment = {} if flags.devices_per_process is None else {DEVICES: str(flags.devices_per_process)}
    return Launch(flags.processes, of_process, flags.max_restarts, environment).run()
