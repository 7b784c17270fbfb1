"""`meshpipe` with less patience, which says when it dispatches a step."""

import sys

from meshpipe.cli.main import main
from meshpipe.processes import progress

progress.MIN_SECONDS = progress.FIRST_STEP_SECONDS = 4.0
dispatched = progress.Progress.dispatched


def say(at: progress.Progress, step: int) -> None:
    dispatched(at, step)
    print(f"step {step} is dispatched", flush=True)


progress.Progress.dispatched = say  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
