"""`meshpipe` with less patience."""

import sys

from meshpipe.cli.main import main
from meshpipe.processes import progress

progress.MIN_SECONDS = progress.FIRST_STEP_SECONDS = 2.0

if __name__ == "__main__":
    sys.exit(main())
