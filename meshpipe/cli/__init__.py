"""The commands of `meshpipe`, their messages and their exit codes."""

from meshpipe.cli.main import main as main
