"""`meshpipe launch`."""

import sys
from dataclasses import dataclass

from meshpipe.cli.arguments import parse
from meshpipe.cli.devices import DEVICES
from meshpipe.errors import check_whole

PROCESS_LIMIT = 1025
"""The number of processes must be below this, far more than one machine runs."""

COMMANDS = {"train": "RECIPE", "generate": "FOLDER", "eval": "FOLDER"}
"""What several processes can run, and what each is called with."""


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
    """Runs N processes on this machine: meshpipe launch --processes N -- train RECIPE."""
    own, separator, command = arguments, "--", []
    if separator in arguments:
        place = arguments.index(separator)
        own, command = arguments[:place], arguments[place + 1 :]
    elif found := [argument for argument in arguments if argument in COMMANDS]:
        raise ValueError(
            f"The command of the processes must follow --. Got {found[0]} without it. "
            f"Write meshpipe launch --processes N -- {found[0]} {COMMANDS[found[0]]}."
        )
    flags = parse(_LaunchFlags, own, "meshpipe launch", launch.__doc__)
    if not command or command[0] not in COMMANDS:
        got = f"Got {command[0]!r}." if command else "Got nothing after it."
        raise ValueError(
            f"The command after -- must be one of {', '.join(COMMANDS)}: "
            f"meshpipe launch --processes N -- train RECIPE. {got}"
        )
    if command[1:2] == [] or command[1].startswith("-"):
        what = COMMANDS[command[0]]
        raise ValueError(
            f"A {what.lower()} comes after {command[0]}: meshpipe launch --processes N -- {command[0]} {what}. "
            "Got none."
        )
    if flags.max_restarts and command[0] != "train":
        raise ValueError(f"--max-restarts is for train. Got it for {command[0]}. Leave it out.")
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
