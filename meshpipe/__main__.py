"""`meshpipe` and `python -m meshpipe`, which are the same program."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def run() -> int:
    """Runs the command of this process, and returns its exit code.

    Ctrl-C while the commands are imported, before one of them handles it, ends the process without a traceback.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, _leave)
    from meshpipe.cli import main

    signal.signal(signal.SIGINT, before)
    return main()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"SIGINT: stopped.\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(run())
