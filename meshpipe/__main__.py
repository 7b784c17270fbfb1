"""`python -m meshpipe`, the same program as `meshpipe`."""

import sys

from meshpipe.cli import main

sys.exit(main())
